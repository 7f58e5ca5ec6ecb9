"""Passes as they are watched: which there were, and what they changed, by an independent count."""

from __future__ import annotations

import io
import json
import re
import timeit
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from checks import randomize
from torch import nn
from zoo import gpt2, llama, t5, torch_encoder

import graphpeft as gp
from graphpeft.errors import AdapterError, VerifyError
from graphpeft.inspect import pass_dump as listing
from graphpeft.inspect.watch import Seen, WatchError, watch
from graphpeft.tracing import Step, counted, step, traced, watching

MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "gpt2": gpt2, "t5": t5}
APPLY = ["capture", "normalize", "find", "plan", "insert", "initialize", "activate", "verify"]


def paths(seen: Seen) -> list[str]:
    return [" > ".join(one.path) for one in seen.steps]


def added(model: nn.Module) -> Counter[str]:
    """Calls in the code of adapted modules that are not in the code of the modules as they were, by target."""
    found: Counter[str] = Counter()
    for module in model.modules():
        if getattr(module, "graph", None) is not None and hasattr(module, "base_class"):
            after, before = calls(module), calls_of_base(module)
            assert not before - after
            found += after - before
    return found


def calls(module: nn.Module) -> Counter[str]:
    nodes = [n for n in module.graph.nodes if n.op.startswith("call")]  # type: ignore[union-attr]
    return Counter(n.target if isinstance(n.target, str) else n.target.__name__ for n in nodes)


def calls_of_base(module: nn.Module) -> Counter[str]:
    plain = nn.Module.__new__(module.base_class)  # type: ignore[type-var, arg-type]
    plain.__dict__.update(module.__dict__ | {"_modules": {k: m for k, m in module._modules.items() if k != "adapters"}})
    tracer = torch.fx.Tracer()
    tracer.is_leaf_module = lambda m, name: True  # type: ignore[method-assign]
    nodes = [n for n in tracer.trace(plain).nodes if n.op.startswith("call")]
    return Counter(n.target if isinstance(n.target, str) else n.target.__name__ for n in nodes)


@pytest.mark.parametrize("name", MODELS)
def test_apply_merge_and_remove_pass_by_pass(name: str, tmp_path: Path) -> None:
    model = MODELS[name]().eval()
    with watch(dump=tmp_path / "dump") as seen:
        gp.apply(model, "qv:lora(r=4)")
        count = added(model)
        gp.merge(model)
        gp.unmerge(model)
        gp.remove(model)
    inner = [f"apply > {one}" for one in APPLY]
    assert paths(seen) == ["apply", *inner, "merge", "unmerge", "remove"]
    deltas = {one.name: one.delta for one in seen.steps}
    assert sum(count.values()) > 0
    assert deltas["apply"] == deltas["activate"] == deltas["unmerge"] == count
    assert deltas["merge"] == deltas["remove"] == {op: -n for op, n in count.items()}
    assert deltas["insert"] == {}, "branches are there, and nothing calls them yet"

    def changed(what: str) -> tuple[str, str]:
        (file,) = (tmp_path / "dump").glob(f"*-{what}.diff")
        lines = file.read_text().splitlines()[2:]
        return "\n".join(x for x in lines if x[0] == "-"), "\n".join(x for x in lines if x[0] == "+")

    gone, new = changed("insert")
    sites = len(gp.plan(model, "qv:lora(r=4)"))
    assert gone == ""
    assert len(re.findall(r"default\.\w+\.factors\.\d\.weight float32 \[4, 64\]", new)) == sites
    assert changed("merge")[0].count(".weight float32 [4, 64]") == sites
    assert "with default merged" in changed("merge")[1]
    calls = [line for line in changed("activate")[1].splitlines() if " float32 " not in line]
    assert "\n".join(calls).count("default.") == 2 * sites
    assert not list((tmp_path / "dump").glob("*-initialize.diff")), "values are no text"


def test_of_a_whole_graph_all_operators_are_counted() -> None:
    model = gpt2().eval()
    sample = {"input_ids": torch.randint(3, 100, (2, 7)), "use_cache": False}
    exported = torch.export.export(model, (), sample, strict=False)
    with watch() as seen:
        made = gp.apply(exported, "qv:lora")
    insert, activate = (next(one for one in seen.steps if one.name == name) for name in ("insert", "activate"))
    nodes = [n for n in made.graph.nodes if n.op.startswith("call")]  # type: ignore[union-attr]
    assert sum(activate.after.values()) == len(nodes)
    assert insert.delta["_assert_tensor_metadata"] < 0, "a rewritten graph has lost the checks of its capture"
    assert sum(activate.delta.values()) == sum("graphpeft" in n.meta for n in nodes)


def test_weights_shown_with_their_delta_are_counted_by_site() -> None:
    model = torch_encoder()
    with watch() as seen:
        gp.apply(model, "qv:lora", inputs=torch.randn(2, 7, 32))
    assert seen.steps[0].delta == {"delta": 4}
    assert "  in_proj_weight + delta(default.in_proj_weight_v)" in listing.listing(model)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Seen, Path]:
    home = tmp_path_factory.mktemp("watched")
    model = llama(layers=1).eval()
    gp.apply(model, "qv:lora(r=2)")
    randomize(model, "default")
    with watch(dump=home / "dump") as seen:
        gp.export(model, home / "out", share=True, verify="fast")
    return seen, home


def test_passes_of_an_export_in_order(exported: tuple[Seen, Path]) -> None:
    seen, _ = exported
    told = paths(seen)
    passes = ["translate", "census", "share", "census", "gemm", "census"]
    passes += ["tags", "census", "defaults", "census", "write"]
    assert told[: len(passes) + 2] == ["export", "export > model", *(f"export > model > {one}" for one in passes)]
    assert told[len(passes) + 2 :].count("export > model > check-numbers") == 1
    assert all(one.error is None for one in seen.steps)


def test_operators_of_an_export_are_those_of_the_file(exported: tuple[Seen, Path]) -> None:
    seen, home = exported
    written = Counter(node.op_type for node in onnx.load(home / "out" / "model.onnx").graph.node)
    (write,) = [one for one in seen.steps if one.name == "write"]
    assert write.after == written
    (gemm,) = [one for one in seen.steps if one.name == "gemm"]
    assert gemm.delta["Gemm"] == written["Gemm"] == 2
    assert gemm.delta["Add"] == -2
    (share,) = [one for one in seen.steps if one.name == "share"]
    assert share.delta == {"MatMul": -1}


def test_the_dump_of_an_export(exported: tuple[Seen, Path]) -> None:
    seen, home = exported
    told = json.loads((home / "dump" / "steps.json").read_text())["graphpeft_steps"]
    assert [one["step"] for one in told] == [one.name for one in seen.steps]
    named_files = {name for one in told for name in one["files"]}
    assert {p.name for p in (home / "dump").iterdir()} == {*named_files, "steps.json", "steps.txt"}
    (diff,) = (home / "dump").glob("*-gemm.diff")
    assert len(re.findall(r"^\+.* = Gemm\(", diff.read_text(), re.M)) == 2
    (text,) = (home / "dump").glob("*-write.txt")
    assert re.search(r"^input input_ids  int64 \[batch, sequence\]$", text.read_text(), re.M)
    table = (home / "dump" / "steps.txt").read_text()
    assert table.strip() == str(seen)
    assert re.search(r"^    gemm +\d+\.\d{3} +\d+ .*\+2 Gemm", table, re.M)


@pytest.mark.slow
def test_two_graphs_nest_under_their_names(tmp_path: Path) -> None:
    model = t5(num_layers=1).eval()
    gp.apply(model, "qv:lora(r=2)")
    with watch() as seen:
        gp.export(model, tmp_path / "out", verify="off")
    for graph in ("encoder", "decoder"):
        assert f"export > {graph} > gemm" in paths(seen)


def test_nothing_is_made_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[object] = []
    counts: list[object] = []

    def spied(function: Any, made: list[object]) -> Any:
        def spy(subject: object) -> object:
            made.append(subject)
            return function(subject)

        spy.dispatch = function.dispatch  # type: ignore[attr-defined]
        return spy

    monkeypatch.setattr(listing, "listing", spied(listing.listing, texts))
    monkeypatch.setattr(listing, "ops", spied(listing.ops, counts))
    with watch() as seen:
        gp.plan(llama(), "qv:lora")
    assert texts == [], "there is no folder"
    assert len(counts) >= 2 * len(seen.steps) > 0
    counts.clear()
    steps = len(seen.steps)
    gp.apply(llama(), "qv:lora")
    assert (texts, counts, len(seen.steps)) == ([], [], steps)


def test_a_step_that_nobody_watches_costs_microseconds() -> None:
    bare = timeit.timeit(lambda: None, number=20_000)
    wrapped = traced("plan")(lambda x=None: None)
    assert (timeit.timeit(wrapped, number=20_000) - bare) / 20_000 < 20e-6


def test_what_fails_is_recorded_and_the_dump_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()

    def fail(*_: object) -> None:
        raise VerifyError("two lines\nof text")

    monkeypatch.setattr("graphpeft.passes.verify._graphs", fail)
    with pytest.raises(VerifyError), watch(dump=tmp_path) as seen:
        gp.apply(model, "qv:lora")
    errors = {one.name: one.error for one in seen.steps}
    assert errors["verify"] == errors["apply"] == "VerifyError: two lines\nof text"
    assert [name for name, error in errors.items() if error is None] == APPLY[:-1]
    told = json.loads((tmp_path / "steps.json").read_text())["graphpeft_steps"]
    assert [one["error"] for one in told] == [one.error for one in seen.steps]
    assert "failed: VerifyError: two lines" in (tmp_path / "steps.txt").read_text()
    assert not hasattr(model, "_graphpeft")


def test_a_watch_that_fails_stops_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    model = llama()
    monkeypatch.setattr("graphpeft.inspect.watch._Folder.write", full)
    with pytest.raises(WatchError, match=r"Passes ran.*no space left"), watch(dump=tmp_path / "dump"):
        gp.apply(model, "qv:lora")
    assert gp.verify(model).ok


def test_printing_after_some_passes(capsys: pytest.CaptureFixture[str]) -> None:
    model = llama(layers=1)
    with watch(print_after={"activate", "merge"}):
        gp.apply(model, "q:lora")
        gp.merge(model)
    told = capsys.readouterr()
    assert told.out == ""
    assert re.findall(r"^-- after (.*)$", told.err, re.M) == ["apply > activate", "merge"]
    assert re.search(r"%linear\S* = linear\(%reshape\S*, default\.q\[1\]\.weight\)", told.err)
    with watch(print_after="all"):
        gp.plan(llama(layers=1), "q:lora")
    printed = re.findall(r"^-- after (.*)$", capsys.readouterr().err, re.M)
    assert printed == ["capture", "normalize", "find", "plan"]


def test_unknown_passes_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WatchError, match=r"no pass 'insrt'. Did you mean 'insert'\? There are: activate, apply, "):
        watch(print_after=["insrt"]).__enter__()
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(WatchError, match=r"not an earlier dump.*new folder"):
        watch(dump=tmp_path).__enter__()
    with pytest.raises(WatchError, match=r"not an earlier dump"):
        watch(dump=tmp_path / "mine.txt").__enter__()
    assert (tmp_path / "mine.txt").read_text() == "keep"
    with watch(dump=tmp_path / "dump"):
        gp.plan(llama(layers=1), "qv:lora")
    assert len(list((tmp_path / "dump").iterdir())) > 2
    with watch(dump=tmp_path / "dump"):
        pass
    assert {p.name for p in (tmp_path / "dump").iterdir()} == {"steps.json", "steps.txt"}, "the first dump is replaced"


def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with watch(progress=True):
        gp.plan(llama(layers=1), "q:lora")
    assert capsys.readouterr().err == ""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal)
    with watch(progress=True), step("check-slots"):
        for _ in counted([1, 2, 3]):
            __import__("time").sleep(0.15)
    assert "check-slots" in terminal.getvalue()
    assert "2/3" in terminal.getvalue()


def test_steps_tell_their_depth_and_count() -> None:
    told: list[tuple[str, int, int, int]] = []

    class Ear:
        def begin(self, one: Step) -> None:
            told.append((one.name, one.depth, one.done, one.total))

        def advance(self, one: Step) -> None:
            told.append((one.name, one.depth, one.done, one.total))

        def end(self, one: Step) -> None:
            pass

    with watching(Ear()), step("a"), step("b"):
        assert list(counted("xy")) == ["x", "y"]
    assert told == [("a", 0, 0, 0), ("b", 1, 0, 0), ("b", 1, 0, 2), ("b", 1, 1, 2), ("b", 1, 2, 2)]


def test_a_merge_that_is_refused_is_seen_as_failed() -> None:
    model = llama()
    gp.apply(model, "qv:lora")
    with watch() as seen:
        with pytest.raises(AdapterError):
            gp.merge(model, "none_such")
        gp.merge(model=model)
    assert [one.error is None for one in seen.steps] == [False, True]
    assert seen.steps[1].delta, "the subject may be given by name"
