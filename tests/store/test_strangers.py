"""Text from files of strangers: put anywhere it may stand, it is refused by our errors or changes nothing, and never runs."""

from __future__ import annotations

import copy
import hashlib
import json
import keyword
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from checks import build, call, outputs, randomize, same
from exports import CLOSE, SAMPLE, deployed, off, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graphpeft as gp
from graphpeft.capturing.skeleton import skeleton
from graphpeft.errors import AdapterError, CaptureError, ExportError, FileError
from graphpeft.names import attribute, is_name, unwritable
from graphpeft.runtime.doctor import doctor
from graphpeft.store.checkpoint import open_checkpoint

RAN = "GRAPHPEFT_RAN"
"""An environment variable that hostile text sets where it runs as code."""
CODE = f"__import__('os').environ.__setitem__('{RAN}', '1')"
HOSTILE = {
    "quotes": f'q", None) or {CODE} or str("',
    "single quotes": f"q', None) or {CODE} or str('",
    "backslash": 'q\\", None) or x("',
    "dots": "q.__class__.__init__",
    "only dots": "...",
    "newline": f"q\n    {CODE}\n",
    "other newline": f"q\u2028{CODE}",
    "control": "q\x1b[2J\x00",
    "call": f"q) or {CODE} or (q",
    "keyword": "import",
    "ligature": "\ufb01",
    "dunder": "__class__",
    "empty": "",
    "long": "q" * 10_000,
    "path": "../../../etc/passwd",
    "nested": f"{{{CODE}}}",
}
LIKE = (
    "single quotes",
    "backslash",
    "only dots",
    "control",
    "call",
    "ligature",
    "dunder",
    "path",
    "nested",
    "other newline",
)
hostile = pytest.mark.parametrize("kind", HOSTILE)
Where = tuple[str | int, ...]


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(RAN, raising=False)
    yield
    assert RAN not in os.environ, "text of a file was run"


def texts(content: Any, where: Where = ()) -> Iterator[tuple[Where, str]]:
    """Every text of a JSON content, and where it stands."""
    if isinstance(content, str):
        yield where, content
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in pairs:
        yield from texts(value, (*where, key))


def changed(content: Any, where: Where, text: Any) -> Any:
    made = here = copy.deepcopy(content)
    for key in where[:-1]:
        here = here[key]
    here[where[-1]] = text
    return made


def renamed(content: Any, where: Where, text: str) -> Any:
    """The content with another key in place of the last one, in its place."""
    made = here = copy.deepcopy(content)
    for key in where[:-1]:
        here = here[key]
    pairs = [(text if key == where[-1] else key, value) for key, value in here.items()]
    here.clear()
    here.update(pairs)
    return made


def keys(content: Any, where: Where = ()) -> Iterator[Where]:
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in pairs:
        if isinstance(key, str):
            yield (*where, key)
        yield from keys(value, (*where, key))


class Saved:
    """A saved adapter, what loads it, and what it computes."""

    def __init__(self, folder: Path, format: Any) -> None:
        self.build = partial(build, "llama") if format == "graphpeft" else partial(tiny, "llama")
        model = self.build()
        self.call = call("llama", model)
        self.base = self.of(model)
        gp.apply(model, "q[layers=0]:lora(r=2); up[layers=1]:rlora(r=4)" if format == "graphpeft" else "q:lora(r=2)")
        randomize(model)
        self.folder, self.adapted = gp.save(model, folder, format=format), self.of(model)
        self.name = "adapter.json" if format == "graphpeft" else "adapter_config.json"
        self.about = json.loads((folder / self.name).read_text())
        self.model = self.build()

    def of(self, model: nn.Module) -> list[Tensor]:
        return outputs(model, self.call)[:1]

    def try_on(self, about: Any, folder: Path, numbers: bool = True) -> str:
        """Load the folder with another description: `refused`, or `loaded` to the same numbers. The model is left as it was."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        (folder / self.name).write_text(json.dumps(about))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                gp.load(self.model, folder, "found")
            except FileError:
                assert same(self.of(self.model), self.base)
                return "refused"
        found = self.of(self.model)
        gp.remove(self.model, "found")
        assert same(self.of(self.model), self.base)
        assert same(found, self.adapted) or not numbers
        return "loaded"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    return {kind: Saved(tmp_path_factory.mktemp("saved") / kind, kind) for kind in ("graphpeft", "peft")}


FOR_READERS = {"source", "name", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version"}
"""Fields on which nothing depends: a caller who gives a name takes no other."""
PATHS = {"base_model_name_or_path"}
REFUSED_THERE = {"quotes", "single quotes", "newline", "other newline", "control", "long"}


def in_formats(kinds: Iterable[str], peft: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrize by kinds of text and formats. PEFT's files need a capture for each: some kinds, and all under -m slow."""
    often = {"graphpeft": set(kinds), "peft": set(peft)}
    cases = [(kind, format) for format in often for kind in HOSTILE]
    marked = [pytest.param(k, f, marks=() if k in often[f] else pytest.mark.slow) for k, f in cases]
    return pytest.mark.parametrize(("kind", "format"), marked)


@in_formats([kind for kind in HOSTILE if kind not in LIKE], peft=["quotes", "newline", "keyword"])
def test_in_every_text_of_a_description(kind: str, format: str, saved: dict[str, Saved], tmp_path: Path) -> None:
    one = saved[format]
    loaded = [
        where
        for where, _ in texts(one.about)
        if one.try_on(changed(one.about, where, HOSTILE[kind]), tmp_path) == "loaded"
    ]
    # A path on another machine may have quotes in it; all else of such a kind is refused everywhere.
    refused = kind in REFUSED_THERE
    allowed = FOR_READERS if not refused else PATHS if "quotes" in kind else set()
    # The adapter acts wherever its weight is read, whoever is said to read it.
    allowed |= {"owner"} if kind == "empty" else set()
    assert not [where for where in loaded if not allowed & set(where)]


@in_formats(["keyword", "newline"], peft=["keyword"])
def test_in_every_name_of_a_field(kind: str, format: str, saved: dict[str, Saved], tmp_path: Path) -> None:
    """An unknown field is ignored with a warning, but for text that no field has. Without a field PEFT has its defaults."""
    one = saved[format]
    for where in keys(one.about):
        found = one.try_on(renamed(one.about, where, HOSTILE[kind]), tmp_path, numbers=format == "graphpeft")
        assert found == "refused" or kind not in REFUSED_THERE, where


BRACKETS = "(" * 2000 + ")" * 2000
ODD: list[tuple[str, Any]] = [
    *((field, text) for field in ("target_modules", "exclude_modules") for text in (BRACKETS, "a{99999999999}", "(")),
    ("modules_to_save", [BRACKETS]),
    ("rank_pattern", {BRACKETS: 2}),
    ("alpha_pattern", {"a{99999999999}": 2}),
    ("rank_pattern", {"q_proj": 10**12}),
    ("lora_alpha", 10**400),
    ("lora_alpha", float("nan")),
    ("lora_dropout", 10**400),
    ("r", 10**12),
]


@pytest.mark.parametrize(("field", "value"), ODD, ids=[f"{field} {str(value)[:12]}" for field, value in ODD])
def test_patterns_and_numbers_that_nothing_can_count_with(
    field: str, value: Any, saved: dict[str, Saved], tmp_path: Path
) -> None:
    one = saved["peft"]
    assert one.try_on({**one.about, field: value}, tmp_path, numbers=False) == "refused" or field in {
        "exclude_modules",
        "alpha_pattern",
        "modules_to_save",
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [("projection_prng_key", 2**64), ("projection_prng_key", -1), ("d_initial", 10**40), ("r", 10**12)],
)
def test_vera_with_such_numbers(field: str, value: Any, tmp_path: Path) -> None:
    model = build("llama")
    gp.save(gp.apply(model, "q:vera(r=4)"), tmp_path, format="peft")
    gp.remove(model)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**about, field: value}))
    with pytest.raises(FileError):
        gp.load(model, tmp_path)
    assert not hasattr(model, "_graphpeft")


def test_a_key_that_no_generator_takes(saved: dict[str, Saved], tmp_path: Path) -> None:
    one = saved["graphpeft"]
    about = copy.deepcopy(one.about)
    about["sites"][0]["method"] = f"vera(r=2, key={2**64})"
    assert one.try_on(about, tmp_path) == "refused"


@pytest.mark.parametrize("name", ["adapter.json", "adapter_config.json"])
def test_deep_nesting(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(FileError, match="not readable JSON"):
        gp.load(build("llama"), tmp_path)
    tied: dict[str, Any] = {}
    for _ in range(400):
        tied = {"tied": [tied]}
    (tmp_path / name).write_text(json.dumps({"format": "graphpeft", "sites": [tied]}))
    with pytest.raises(FileError):
        gp.load(build("llama"), tmp_path)


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "nope", "auto_map": {"AutoConfig": "x.Y"}}, "no config that transformers can read"),
        ({"model_type": "llama", "_attn_implementation": "evil/kernel"}, "asks for the attention 'evil/kernel'"),
        ({"model_type": "llama", "attn_implementation": "evil/kernel"}, "asks for the attention 'evil/kernel'"),
        (
            {"model_type": "qwen2_5_omni", "attn_implementation": {"thinker_config": {"text_config": "evil/kernel"}}},
            "asks for the attention 'evil/kernel'",
        ),
        ({"model_type": "llama", "architectures": ["pipeline"]}, "names the architecture 'pipeline'"),
        ({"model_type": "llama", "architectures": ["__class__"]}, "names the architecture '__class__'"),
        ({"model_type": "llama", "architectures": ["utils"]}, "names the architecture 'utils'"),
    ],
)
def test_the_config_of_a_checkpoint_runs_nothing(
    config: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "x.py").write_text(f"{CODE}\nclass Y: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever asks is told yes
    with pytest.raises(CaptureError, match=message):
        skeleton(str(tmp_path))


def test_the_index_of_a_checkpoint_and_its_shards(tmp_path: Path) -> None:
    index, shard = tmp_path / "model.safetensors.index.json", tmp_path / "model.safetensors"
    for text in (
        "[" * 100_000,
        '{"weight_map": {"a": "../b"}}',
        '{"weight_map": {"a": "\\ud800"}}',
        '{"weight_map": 5}',
        "{}",
    ):
        index.write_text(text)
        with pytest.raises(FileError):
            open_checkpoint(tmp_path)
    index.unlink()
    headers = ("[" * 100_000, '{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 4]}}', '{"a": 5}')
    for header in map(str.encode, headers):
        shard.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(FileError):
            open_checkpoint(tmp_path)


@hostile
def test_a_role_in_every_place_that_names_it(kind: str, saved: dict[str, Saved], tmp_path: Path) -> None:
    """The sample that ran: a role on which tensors, sites and digest agree."""
    one, role = saved["graphpeft"], HOSTILE[kind]
    folder = Path(shutil.copytree(one.folder, tmp_path / "adapter"))
    tensors = {k.replace(":q.", f":{role}."): t for k, t in load_file(folder / "adapter.safetensors").items()}
    save_file(tensors, folder / "adapter.safetensors")
    about = copy.deepcopy(one.about)
    for site in about["sites"]:
        site["role"] = role if site["role"] == "q" else site["role"]
    about["tensors_sha256"] = hashlib.sha256((folder / "adapter.safetensors").read_bytes()).hexdigest()
    (folder / "adapter.json").write_text(json.dumps(about))
    model = build("llama")
    if kind not in {"dots", "keyword", "dunder"}:
        with pytest.raises(FileError, match=r"a site has the role|role holds"):
            gp.load(model, folder)
        assert same(one.of(model), one.base)
        return
    # Words, joined by dots: what another package may have declared. It is an adapter like any other.
    gp.load(model, folder)
    assert same(one.of(model), one.adapted)
    gp.save(model, tmp_path / "again")
    assert same(one.of(gp.load(build("llama"), tmp_path / "again")), one.adapted)


def test_a_name_of_the_files_that_cannot_be_one_here(saved: dict[str, Saved], tmp_path: Path) -> None:
    one = saved["graphpeft"]
    for name in ("items", "__class__", "training", "sites", "class", "lambda"):
        shutil.copytree(one.folder, tmp_path, dirs_exist_ok=True)
        (tmp_path / "adapter.json").write_text(json.dumps({**one.about, "name": name}))
        with pytest.raises(FileError, match=rf"calls its adapter '{name}'.*with name="):
            gp.load(build("llama"), tmp_path)
        gp.load(build("llama"), tmp_path, "mine")


@hostile
def test_a_name_that_the_caller_gives(kind: str) -> None:
    model = build("llama")
    with pytest.raises(AdapterError, match="cannot name an adapter"):
        gp.apply(model, "q:lora(r=2)", name=HOSTILE[kind])
    assert not hasattr(model, "_graphpeft")


def test_an_owner_that_does_not_hold_the_weight(saved: dict[str, Saved], tmp_path: Path) -> None:
    """The adapter acts where the weight is held, so that no owner in a file can leave it unused."""
    one = saved["graphpeft"]
    for owner in ("", "model", "model.layers.0.self_attn"):
        for form, outcome in (("branch", "loaded"), ("weight", "refused")):  # loaded to the same numbers
            about = copy.deepcopy(one.about)
            about["sites"][0] |= {"owner": owner, "form": form}
            assert one.try_on(about, tmp_path) == outcome


# -- exports ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return Path(shutil.copytree(deployed().folder, tmp_path / "deploy"))


def opens(folder: Path) -> bool:
    """Whether a session opens the folder; then it computes what it did before."""
    try:
        session = gp.Session(folder)
    except FileError:
        assert not all(finding.good for finding in doctor(folder))
        return False
    session.use("a")
    assert off(session.run({"x": SAMPLE["x"].numpy()})["output"], deployed().want["a"]) < CLOSE
    return True


@hostile
def test_in_every_text_of_a_sidecar(kind: str, export: Path) -> None:
    sidecar = export / "a.json"
    about = json.loads(sidecar.read_text())
    for where, _ in texts(about):
        sidecar.write_text(json.dumps(changed(about, where, HOSTILE[kind])))
        # Rules are not parsed where there is no torch, and a word may be a name; nothing there depends on either.
        assert not opens(export) or where == ("rules",) or HOSTILE[kind].isidentifier(), where


def describe(graph: Path, key: str, text: str) -> None:
    proto = onnx.load(graph, load_external_data=False)
    for each in proto.metadata_props:
        if each.key == key:
            each.value = text
    onnx.save(proto, graph)


def metadata(graph: Path) -> dict[str, str]:
    return {each.key: each.value for each in onnx.load(graph, load_external_data=False).metadata_props}


@hostile
def test_in_every_text_of_the_metadata(kind: str, export: Path) -> None:
    graph = export / "model.onnx"
    for key, before in metadata(graph).items():
        if key.startswith("graphpeft."):
            describe(graph, key, HOSTILE[kind])
            assert not opens(export), key
            describe(graph, key, before)
    assert opens(export)


@pytest.mark.parametrize("change", [changed, renamed], ids=["text", "name"])
@hostile
def test_in_the_table_of_slots(kind: str, change: Callable[..., Any], export: Path) -> None:
    graph = export / "model.onnx"
    before = json.loads(metadata(graph)["graphpeft.slots"])
    places = [where for where, _ in texts(before)] if change is changed else list(keys(before))
    for where in places:
        describe(graph, "graphpeft.slots", json.dumps(change(before, where, HOSTILE[kind])))
        # `A` repeats what follows from the sites.
        assert not opens(export) or where[-1] == "A", where


@hostile
def test_in_the_report_of_an_export(kind: str, export: Path) -> None:
    """An export reads which files are of the one that it replaces."""
    report = export / "graphpeft.json"
    about = json.loads(report.read_text())
    before = sorted(path.name for path in export.iterdir())
    loose = {"checks", "notes"}  # sentences
    for where in [w for w, _ in texts(about)] + [("files", name) for name in about["files"]]:
        in_files = where[0] == "files"
        if in_files or (kind in REFUSED_THERE and not loose & set(where)):
            report.write_text(json.dumps((renamed if in_files else changed)(about, where, HOSTILE[kind])))
            with pytest.raises(ExportError, match=r"graphpeft's export did not write it|is not part of it"):
                gp.export(deployed().model, export, inputs=SAMPLE, verify="off")
            assert sorted(path.name for path in export.iterdir()) == before


# -- names -----------------------------------------------------------------------------------------------------------


@hostile
def test_what_is_made_from_a_text_is_a_name(kind: str) -> None:
    made = attribute(HOSTILE[kind].replace(".", "_"))
    assert is_name(f"_{made}")
    assert not keyword.iskeyword(made)
    graph = torch.fx.Graph()
    graph.output(graph.create_node("get_attr", made))
    assert unwritable(graph) is None


def test_names_of_today_stay() -> None:
    for text in ("q", "experts_gate", "0_q", "in_proj_q", "attn_q_proj_q", "default", "größe"):
        assert attribute(text) == text
    assert len({attribute(text) for text in ("a-b", "a b", "a_b", "a.b", "")}) == 5


class Odd(nn.Module):
    """Modules under names that are no words, and its own code, which uses their weights itself."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts.values():
            x = nn.functional.linear(x, part.weight).relu()
        return x @ x.transpose(1, 2)


@pytest.mark.parametrize("name", ["a-b", "in", "it's", 'q", None) or x("', "a b", "ﬁ"])
def test_modules_of_such_names_are_adapted_all_the_same(name: str, tmp_path: Path) -> None:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = Odd(name, "plain")
    base = outputs(model, ((x,), {}))
    before = copy.deepcopy(model)
    gp.apply(model, "path(parts*):lora(r=2)", inputs=(x,))
    randomize(model)
    adapted = outputs(model, ((x,), {}))
    assert not same(adapted, base)
    gp.save(model, tmp_path)
    assert same(outputs(gp.load(before, tmp_path), ((x,), {})), adapted)
    gp.remove(model)
    assert same(outputs(model, ((x,), {})), base)


def test_two_weights_never_share_a_place() -> None:
    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.a_b = nn.Module(), nn.Linear(8, 8)
            self.a.b = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.linear(x, self.a.b.weight).relu()
            return nn.functional.linear(x, self.a_b.weight).relu() @ x.transpose(1, 2)

    x = torch.randn(2, 5, 8)
    model = torch.export.export(Clash(), (x,)).module(check_guards=False)  # one owner has both weights
    with pytest.raises(AdapterError, match=r"a_b\.weight \(.*\) and a\.b\.weight|a\.b\.weight \(.*\) and a_b\.weight"):
        gp.apply(model, "path(a*):lora(r=2)")
    assert not hasattr(model, "adapters")
