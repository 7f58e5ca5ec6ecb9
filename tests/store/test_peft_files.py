"""PEFT's format against PEFT itself: equal logits both ways, on five architectures, with adapters that act; and refusals.

Logits are compared to 1e-5, absolute, in float32: the two sum in different orders. Every adapter moves them by a
thousand times as much.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
from checks import Snapshot, build, outputs
from peft import LoraConfig, PeftModel, VeraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zoo import llama, mixtral, torch_encoder

import graphpeft as gp
from graphpeft.capturing import survey
from graphpeft.errors import AdapterError, FileError
from graphpeft.store.peft.config import looked_up, pattern, selection, targeted

pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = 1e-5
TOKENS = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))
MODELS = ["llama", "gpt2", "bert", "t5", "mixtral"]


@pytest.fixture(scope="module", autouse=True)
def _one_capture_for_each_architecture() -> Iterator[None]:
    """Sites depend on the architecture alone; captures would take most of the time here."""
    known: dict[Any, Any] = {}
    sites: dict[int, Any] = {}
    capture, find = survey.capture_programs, survey.find_sites

    def once(model: nn.Module, inputs: Any = None) -> Any:
        key = None if isinstance(model, torch.fx.GraphModule) else type(model).__name__.removeprefix("Adapted")
        key = key and (key, *((n, tuple(p.shape)) for n, p in model.named_parameters() if "adapters." not in n))
        if key is None or key not in known:
            known[key] = capture(model, inputs)
            sites[id(known[key])] = find(known[key])  # now: later the model that was captured has adapters
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in ("graphpeft.applying", "graphpeft.capturing.survey"):
            patch.setattr(import_module(module), "capture_programs", once)
            patch.setattr(import_module(module), "find_sites", lambda captured: sites[id(captured)])
        yield


def fresh(name: str) -> nn.Module:
    """The same base weights in a new model."""
    if name == "mixtral":
        torch.manual_seed(0)
        return mixtral().eval()
    model: Any = build(name)
    if name == "bert":
        model.classifier.weight.data *= 30  # or what q and v do to three logits would drown in rounding
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    more = {"decoder_input_ids": TOKENS.flip(1)} if model.config.is_encoder_decoder else {}
    found: Tensor = model(input_ids=TOKENS, **more).logits
    return found


def randomized(model: Any, std: float | None = None) -> Any:
    """Every trained number at random, smaller in T5, whose attention has no scale and soon saturates."""
    std = std or (0.1 if getattr(model.config, "is_encoder_decoder", False) else 0.3)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def adapted(name: str, rules: str) -> nn.Module:
    return randomized(gp.apply(fresh(name), rules))


def theirs(name: str, config: peft.PeftConfig, folder: Path, std: float | None = None) -> Tensor:
    """Save a random adapter with PEFT; returns its logits, which the base's are far from."""
    model = randomized(peft.get_peft_model(fresh(name), config), std)
    model.save_pretrained(folder)
    found = logits(model)
    assert distance(found, logits(fresh(name))) > 1000 * TOLERANCE
    return found


def in_peft(name: str, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        if "target_parameters" not in config_of(folder):  # of their patterns PEFT says so, and uses them
            warnings.filterwarnings("error", message=".*did not match any.*")
        return PeftModel.from_pretrained(fresh(name), str(folder)).eval()


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def edit(folder: Path, **changes: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({k: t.clone().contiguous() for k, t in change(load_file(file)).items()}, file)


# -- the grid --------------------------------------------------------------------------------------------------------

OURS = {
    "lora": "qv:lora(r=4, alpha=8); o:lora(r=2, alpha=5)",
    "rslora": "qv:lora(r=4, alpha=8, rslora=true); o:lora(r=2, rslora=true)",
    "rslora beside lora": "q:lora(r=4, alpha=8, rslora=true); v:lora(r=3, alpha=2)",
    "dora": "qv:dora(r=4, alpha=8); o:dora(r=2)",
    "vera": "attn:vera(r=8, key=3, d_initial=0.2)",
    "lowered": "q:melora(n=2, r=2); v:rlora(r=16); o:olora(r=4); up:pissa(r=2); down:blora(r=4)",
    "table": "embed:lora(r=4, alpha=8)",
}


@pytest.mark.parametrize("rules", OURS.values(), ids=OURS.keys())
@pytest.mark.parametrize("name", MODELS)
def test_peft_loads_what_we_save(name: str, rules: str, tmp_path: Path) -> None:
    if name == "mixtral":
        rules = rules.replace("up:", "experts.up:").replace("down:", "experts.down:")
    _there_and_back(name, rules, tmp_path)


def test_experts_and_their_router_go_as_parameters(tmp_path: Path) -> None:
    _there_and_back("mixtral", "q:lora(r=2); experts:lora(r=3, alpha=5); router:lora(r=2)", tmp_path)
    about = config_of(tmp_path / "ours")
    assert about["target_modules"] == ["q_proj"]
    assert about["target_parameters"][0] == "model.layers.0.mlp.experts.down_proj"
    assert about["rank_pattern"] == {"down_proj": 3, "gate_up_proj": 6}, "gate and up are one weight of the summed rank"


def _there_and_back(name: str, rules: str, folder: Path) -> None:
    model, base = adapted(name, rules), logits(fresh(name))
    ours = logits(model)
    assert distance(ours, base) > 1000 * TOLERANCE
    gp.save(model, folder / "ours", format="peft")
    there = in_peft(name, folder / "ours")
    assert distance(logits(there), ours) < TOLERANCE
    back = gp.load(fresh(name), folder / "ours").eval()
    assert distance(logits(back), ours) < TOLERANCE
    there.save_pretrained(str(folder / "theirs"))
    assert distance(logits(gp.load(fresh(name), folder / "theirs").eval()), ours) < TOLERANCE
    gp.remove(back)
    assert torch.equal(logits(back), base)


QV = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "bert": ["query", "value"], "t5": ["q", "v"]}
QV["mixtral"] = QV["llama"]
THEIRS: dict[str, Callable[[list[str]], peft.PeftConfig]] = {
    "lora": lambda qv: LoraConfig(r=4, target_modules=qv, rank_pattern={qv[0]: 3}, lora_dropout=0.1),
    "rslora": lambda qv: LoraConfig(
        r=4, target_modules=qv, use_rslora=True, alpha_pattern={rf"[^a]*\.0\..*{qv[0]}": 3}
    ),
    "dora": lambda qv: LoraConfig(r=4, target_modules=qv, use_dora=True),
    "regex": lambda qv: LoraConfig(r=2, target_modules=rf".*\.1\..*\.({'|'.join(qv)})"),
    "vera": lambda qv: VeraConfig(r=8, target_modules=qv, projection_prng_key=5, save_projection=True),
    "vera, drawn": lambda qv: VeraConfig(r=8, target_modules=qv, projection_prng_key=5, save_projection=False),
}


@pytest.mark.parametrize("make", THEIRS.values(), ids=THEIRS.keys())
@pytest.mark.parametrize("name", MODELS)
def test_we_load_what_peft_saves(name: str, make: Callable[[list[str]], peft.PeftConfig], tmp_path: Path) -> None:
    wanted = theirs(name, make(QV[name]), tmp_path)
    model = gp.load(fresh(name), tmp_path, name="theirs")
    assert gp.trainable(model)[0] > 0
    assert distance(logits(model.eval()), wanted) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", LoraConfig(r=4, target_modules="all-linear")),
        ("llama", LoraConfig(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[1])),
        ("llama", LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"])),
        ("gpt2", LoraConfig(r=4, target_modules=["lm_head"])),
        ("gpt2", LoraConfig(r=4, target_modules=["wte", "lm_head"])),
        ("gpt2", LoraConfig(r=4, target_modules=["wte", "lm_head"], ensure_weight_tying=True)),
        ("t5", LoraConfig(r=4, target_modules=["encoder.embed_tokens", "q"])),
        ("mixtral", LoraConfig(r=4, target_parameters=["experts.gate_up_proj", "experts.down_proj", "gate.weight"])),
        ("mixtral", LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["experts.down_proj"])),
    ],
    ids=["all-linear", "one layer", "table and head", "tied: head", "tied: apart", "tied: one", "tied: one of three",
         "experts and router", "one of two parameters"],
)  # fmt: skip
def test_we_load_other_targets_of_peft(name: str, config: peft.PeftConfig, tmp_path: Path) -> None:
    wanted = theirs(name, config, tmp_path / "theirs", std=0.1)
    model = gp.load(fresh(name), tmp_path / "theirs").eval()
    assert distance(logits(model), wanted) < TOLERANCE
    gp.save(model, tmp_path / "again", format="peft")
    assert distance(logits(in_peft(name, tmp_path / "again")), wanted) < TOLERANCE


@pytest.mark.parametrize("method", ["lora(r=2)", "dora(r=2)"])
def test_convolutions(method: str, tmp_path: Path) -> None:
    model = randomized(gp.apply(fresh("vit"), f"conv:{method}"), std=2.0)
    pixels: Any = ((), {"pixel_values": torch.randn(2, 3, 16, 16)})
    (ours, *_), (base, *_) = outputs(model, pixels), outputs(fresh("vit"), pixels)
    assert distance(ours, base) > 1000 * TOLERANCE
    gp.save(model, tmp_path, format="peft")
    assert distance(outputs(in_peft("vit", tmp_path).base_model.model, pixels)[0], ours) < TOLERANCE
    assert distance(outputs(gp.load(fresh("vit"), tmp_path).eval(), pixels)[0], ours) < TOLERANCE


@pytest.mark.parametrize("method", ["olora", "pissa"])
def test_a_converted_adapter_of_peft_loads_on_the_untouched_base(method: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(fresh("llama"), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=method))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = method
    randomized(model)
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(FileError, match=rf"init_lora_weights='{method}'.*path_initial_model_for_weight_conversion"):
        gp.load(fresh("llama"), tmp_path / "raw")
    wanted = logits(model)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert distance(logits(gp.load(fresh("llama"), tmp_path / "plain").eval()), wanted) < TOLERANCE


# -- what is in the files --------------------------------------------------------------------------------------------


def test_a_fused_weight_gets_one_lora_with_zero_rows(tmp_path: Path) -> None:
    model = adapted("gpt2", "q:lora(r=3, alpha=6); v:lora(r=2, alpha=4)")
    gp.save(model, tmp_path, format="peft")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    b = tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    assert b.shape == (192, 5)
    assert b.count_nonzero() == 64 * 5, "q has its rows of the first three columns, v of the last two"
    assert b[:64, :3].count_nonzero() == 64 * 3
    assert b[128:, 3:].count_nonzero() == 64 * 2
    about = config_of(tmp_path)
    wanted = {"r": 5, "lora_alpha": 10, "fan_in_fan_out": True, "target_modules": ["c_attn"], "peft_type": "LORA"}
    assert {key: about[key] for key in wanted} == wanted, "both have the scale 2, which stays that of the config"


def test_dora_leaves_the_rows_of_a_fused_weight_that_no_site_has(tmp_path: Path) -> None:
    gp.save(adapted("gpt2", "qv:dora"), tmp_path, format="peft")
    lengths = load_file(tmp_path / "adapter_model.safetensors")[
        "base_model.model.transformer.h.0.attn.c_attn.lora_magnitude_vector"
    ]
    base = fresh("gpt2").transformer.h[0].attn.c_attn.weight.detach()  # type: ignore[union-attr, index]
    assert torch.allclose(lengths[64:128], base.norm(dim=0)[64:128])
    assert not torch.allclose(lengths[:64], base.norm(dim=0)[:64])


def test_vera_is_pefts_own(tmp_path: Path) -> None:
    gp.save(adapted("llama", "attn:vera(r=8, key=3)"), tmp_path, format="peft")
    about, tensors = config_of(tmp_path), load_file(tmp_path / "adapter_model.safetensors")
    assert (about["peft_type"], about["r"], about["projection_prng_key"]) == ("VERA", 8, 3)
    own = peft.get_peft_model(fresh("llama"), VeraConfig(r=8, target_modules=["q_proj"], projection_prng_key=3))
    assert torch.equal(tensors["base_model.vera_A"], own.base_model.vera_A["default"])
    assert torch.equal(tensors["base_model.vera_B"], own.base_model.vera_B["default"])
    assert (
        gp.explain(gp.load(fresh("llama"), tmp_path))
        .as_dict()["adapters"][0]["rules"]
        .endswith("vera(r=8, key=3, store=projection)")
    )


def test_patterns_are_endings_where_these_are_enough(tmp_path: Path) -> None:
    gp.save(
        adapted("llama", "q:lora(r=4); v[layers=0]:lora(r=2); o[layers=1]:lora(r=3, alpha=5)"), tmp_path, format="peft"
    )
    about = config_of(tmp_path)
    assert about["target_modules"] == [
        "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.o_proj", "model.layers.1.self_attn.q_proj",
    ]  # fmt: skip
    assert about["rank_pattern"] == {"v_proj": 2, "o_proj": 3}
    assert about["alpha_pattern"] == {"v_proj": 2, "o_proj": 5}
    assert "target_parameters" not in about, "older versions of PEFT do not know it"


def test_saving_while_merged_stores_the_same(tmp_path: Path) -> None:
    model = adapted("gpt2", "qv:dora")
    gp.save(model, tmp_path / "apart", format="peft")
    gp.merge(model)
    gp.save(model, tmp_path / "merged", format="peft")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "apart" / file).read_bytes() == (tmp_path / "merged" / file).read_bytes()


def test_a_loaded_adapter_is_one_like_others(tmp_path: Path) -> None:
    theirs("llama", LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1), tmp_path / "theirs")
    model = adapted("llama", "mlp:lora(r=2)")
    gp.load(model, tmp_path / "theirs", name="peft")
    told = gp.explain(model).as_dict()["adapters"][1]
    assert (
        told["rules"]
        == "path(*.q_proj):lora(r=4, alpha=8, dropout=0.1); path(*.v_proj):lora(r=4, alpha=8, dropout=0.1)"
    )
    assert {site["site"]["role"] for site in told["sites"]} == {"q", "v"}, "names lead to the sites that dataflow knows"
    gp.activate(model, ["default", "peft"])
    both = logits(model)
    gp.save(model, tmp_path / "native", "peft")
    again = adapted("llama", "mlp:lora(r=2)")
    gp.load(again, tmp_path / "native", name="peft")
    gp.activate(again, ["default", "peft"])
    assert torch.equal(logits(again), both)


def test_without_a_capture_weights_are_known_by_their_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = theirs("gpt2", LoraConfig(r=4, target_modules=["wte", "c_attn"]), tmp_path)

    def fail(model: nn.Module, inputs: Any) -> None:
        raise gp.errors.CaptureError("no")

    monkeypatch.setattr(survey, "capture_programs", fail)
    assert distance(logits(gp.load(fresh("gpt2"), tmp_path).eval()), wanted) < TOLERANCE


def test_a_graph_of_the_whole_model_takes_an_adapter_and_cannot_save_one(tmp_path: Path) -> None:
    wanted = theirs("llama", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), tmp_path)
    program = torch.export.export(fresh("llama"), (TOKENS,), {"use_cache": False}, strict=False)
    model: Any = gp.load(program.module(check_guards=False), tmp_path)
    assert distance(model(TOKENS, use_cache=False).logits, wanted) < TOLERANCE
    with pytest.raises(AdapterError, match="is one graph"):
        gp.save(model, tmp_path / "x", format="peft")


# -- what is refused -------------------------------------------------------------------------------------------------

HELD_BACK = {
    "dora beside lora": ("llama", "q:dora; v:lora", r"v_proj\.weight \(v\): `lora` is mixed with `dora`"),
    "two dropouts": ("llama", "q:lora(dropout=0.1); v:lora", r"v_proj\.weight \(v\): its dropout is 0 and.*0\.1"),
    "an input transform": ("llama", "q:lora; v:blora(quantize=all)", r"v_proj\.weight \(v\).*the site's input"),
    "rounded base": ("llama", "q:blora(quantize=base)", r"q_proj\.weight \(q\).*depends on the base weight"),
    "dora of a table": ("llama", "embed:dora", r"embed_tokens\.weight \(embed\): PEFT's DoRA differs"),
    "dora of experts": ("mixtral", "experts.down:dora", r"down_proj \(experts\.down\): PEFT's DoRA differs"),
}


@pytest.mark.parametrize(("name", "rules", "message"), HELD_BACK.values(), ids=HELD_BACK.keys())
def test_what_peft_cannot_hold_is_refused_by_name(name: str, rules: str, message: str, tmp_path: Path) -> None:
    model = adapted(name, rules)
    before = Snapshot.of(model)
    with pytest.raises(AdapterError, match=rf"(?s)cannot hold the adapter of .*{message}"):
        gp.save(model, tmp_path / "out", format="peft")
    before.check(model, adapted=True)
    assert not (tmp_path / "out").exists()


def test_modules_that_peft_would_not_reach_are_refused(tmp_path: Path) -> None:
    x = torch.randn(2, 7, 32)
    for rules, message in (
        ("qv:lora", "adapts nn.MultiheadAttention only as a whole"),
        ("up:lora", "never calls the module"),
    ):
        with pytest.raises(AdapterError, match=message):
            gp.save(gp.apply(torch_encoder().eval(), rules, inputs=x), tmp_path, format="peft")
    dilated = nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2), nn.Flatten(), nn.Linear(4 * 16, 2))
    model = gp.apply(dilated, "path(0):lora(r=2)", inputs=(torch.randn(2, 3, 8, 8),))
    with pytest.raises(AdapterError, match="without groups, dilation"):
        gp.save(model, tmp_path, format="peft")


def test_one_folder_holds_one_format(tmp_path: Path) -> None:
    model = adapted("llama", "q:lora")
    gp.save(model, tmp_path / "native")
    gp.save(model, tmp_path / "peft", format="peft")
    with pytest.raises(FileError, match=r"adapter\.json belongs to an adapter in another format"):
        gp.save(model, tmp_path / "native", format="peft")
    with pytest.raises(FileError, match=r"adapter_config\.json belongs to an adapter in another format"):
        gp.save(model, tmp_path / "peft")
    with pytest.raises(AdapterError, match="no format 'gguf'"):
        gp.save(model, tmp_path / "x", format="gguf")  # type: ignore[arg-type]


K = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
V = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a tensor is missing": (
        lambda f: edit_tensors(f, lambda t: {k: x for k, x in t.items() if k != V}), rf"missing: {V}\."
    ),
    "a layer is missing": (
        lambda f: edit_tensors(f, lambda t: {k: x for k, x in t.items() if "layers.1" not in k}),
        r"missing: .*layers\.1\.self_attn\.q_proj\.lora_A.*layers\.1\.self_attn\.v_proj\.lora_B",
    ),
    "of a module that is not there": (
        lambda f: edit_tensors(f, lambda t: t | {Q.replace("layers.0", "layers.7"): t[Q]}), r"unexpected: .*layers\.7"
    ),
    "half of a pair too many": (
        lambda f: edit_tensors(f, lambda t: t | {K: t[Q]}), r"missing: .*0\.self_attn\.k_proj\.lora_B"
    ),
    "something else": (lambda f: edit_tensors(f, lambda t: t | {"junk": t[Q]}), r"unexpected: base_model\.model\.junk"),
    "another rank": (lambda f: edit(f, r=5), r"of another shape: .*q_proj\.lora_A\.weight \(4, 64\), not \(5, 64\)"),
    "A for B": (
        lambda f: edit_tensors(f, lambda t: t | {V: t[Q]}), r"of another shape: .*v_proj\.lora_B\.weight \(4, 64\), not"
    ),
    "a bias of B": (lambda f: edit(f, lora_bias=True), "sets lora_bias, which is more than plain LoRA"),
    "another method": (lambda f: edit(f, peft_type="LOHA"), "its peft_type is 'LOHA'; only LORA and VERA are supported"),
    "no number": (lambda f: edit(f, r="four"), r"its r is .four."),
    "no scale": (lambda f: edit(f, lora_alpha=-1), r"cannot be understood.*option alpha = -1 is not float > 0"),
    "no pattern": (lambda f: edit(f, rank_pattern={"(": 2}), "cannot be understood"),
    "JSON cut short": (lambda f: (f / "adapter_config.json").write_text("{"), "not readable JSON"),
    "tensors cut short": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-9]),
        r"adapter_model\.safetensors cannot be read",
    ),
    "a pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "Pickles are not read.*with PEFT"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_file_that_does_not_fit_is_refused_and_the_model_left_alone(
    damage: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    theirs("llama", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), tmp_path)
    damage(tmp_path)
    model = fresh("llama")
    before = Snapshot.of(model)
    with pytest.raises(FileError, match=rf"(?s){message}"):
        gp.load(model, tmp_path)
    before.check(model)


def test_what_fits_can_be_asked_for(tmp_path: Path) -> None:
    theirs("llama", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), tmp_path)
    edit_tensors(tmp_path, lambda t: {k: x for k, x in t.items() if k != V} | {"junk": t[Q]})
    with pytest.warns(UserWarning, match=rf"missing: {V}; unexpected: .*junk.*strict=False"):
        model = gp.load(fresh("llama"), tmp_path, strict=False)
    sites = gp.explain(model).as_dict()["adapters"][0]["sites"]
    assert [site["site"]["role"] for site in sites] == ["q", "v", "q"]


def test_an_adapter_of_another_architecture_is_refused(tmp_path: Path) -> None:
    theirs("llama", LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    with pytest.raises(FileError, match=r"does not fit GPT2LMHeadModel: its target_modules, \['q_proj'\], match none"):
        gp.load(fresh("gpt2"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj", "c_attn"]}))
    with pytest.raises(FileError, match=r"do not fit GPT2LMHeadModel; missing: .*unexpected: .*q_proj"):
        gp.load(fresh("gpt2"), tmp_path)
    with pytest.raises(FileError, match=r"of another shape: .*\(4, 64\), not \(4, 32\)"):
        gp.load(llama(hidden_size=32), tmp_path)


def test_unknown_fields_are_ignored_with_a_warning(tmp_path: Path) -> None:
    wanted = theirs("llama", LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    edit(tmp_path, use_future=1)
    with pytest.warns(UserWarning, match="ignores: use_future"):
        model = gp.load(fresh("llama"), tmp_path)
    assert distance(logits(model.eval()), wanted) < TOLERANCE


def test_base_weights_in_the_file_have_to_be_the_models(tmp_path: Path) -> None:
    wanted = theirs("bert", LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"), tmp_path)
    with pytest.raises(FileError, match=r"classifier\.bias, classifier\.weight \(modules_to_save: classifier, score\)"):
        gp.load(fresh("bert"), tmp_path)
    with pytest.warns(UserWarning, match=r"classifier\.weight.*left out, as any_base=True asks"):
        gp.load(fresh("bert"), tmp_path, any_base=True)
    model: Any = fresh("bert")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    model.load_state_dict({k.removeprefix("base_model.model."): t for k, t in tensors.items()}, strict=False)
    assert distance(logits(gp.load(model, tmp_path).eval()), wanted) < TOLERANCE


def test_trained_biases_are_named(tmp_path: Path) -> None:
    theirs("bert", LoraConfig(r=4, target_modules=["query"], bias="lora_only"), tmp_path)
    with pytest.raises(FileError, match=r"layer\.0\.attention\.self\.query\.bias"):
        gp.load(fresh("bert"), tmp_path)


def test_dropout_that_a_site_cannot_have_is_named(tmp_path: Path) -> None:
    theirs("llama", VeraConfig(r=4, target_modules=["q_proj"], vera_dropout=0.1), tmp_path)
    with pytest.warns(
        UserWarning, match=r"dropout, which graphpeft cannot apply at model\.layers\.0\.self_attn\.q_proj, "
    ):
        gp.load(fresh("llama"), tmp_path)


def test_a_folder_of_named_adapters_says_where_they_are(tmp_path: Path) -> None:
    theirs("llama", LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "french")
    with pytest.raises(FileError, match="Its folders french hold adapters of PEFT"):
        gp.load(fresh("llama"), tmp_path)


# -- the Hub ---------------------------------------------------------------------------------------------------------


def test_a_repository_is_fetched_only_where_somebody_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = theirs("llama", LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "owner" / "name")
    asked: list[Any] = []

    def snapshot(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision))
        assert not any(".bin" in each or each == "*" for each in allow_patterns)
        return str(tmp_path / "owner" / "name")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    model = gp.load(fresh("llama"), "hub:some/where", revision="v1")
    assert distance(logits(model.eval()), wanted) < TOLERANCE
    gp.load(fresh("llama"), "some/where", hub=True)
    gp.swap(model, "hub:some/where")
    assert asked == [("some/where", "v1"), ("some/where", None), ("some/where", None)]
    monkeypatch.chdir(tmp_path)
    gp.load(fresh("llama"), "owner/name")  # a folder here
    for mistyped in ("some/where", Path("some/where")):
        with pytest.raises(FileError, match=r"some/where: there is no such folder.*write hub:some/where\."):
            gp.load(fresh("llama"), mistyped)
    for nowhere in ("nowhere", "./some/where", "some/where/else", "x" * 5000):
        with pytest.raises(FileError, match=r"there is no such folder\. Check the path\.$"):
            gp.load(fresh("llama"), nowhere)
    for no_name in ("hub:", "hub:one", "hub:a/b/c", "hub:a/b;c", 'hub:a/"b"', f"hub:a/{'b' * 500}"):
        with pytest.raises(FileError, match="not the name of a Hugging Face Hub repository"):
            gp.load(fresh("llama"), no_name)
    with pytest.raises(FileError, match=r"has no revision 'v1'\. Write hub:owner/name"):
        gp.load(fresh("llama"), "owner/name", revision="v1")
    assert len(asked) == 3


def test_a_repository_out_of_reach_is_a_file_error() -> None:
    with pytest.raises(FileError, match="Cannot download repository nobody/nothing from the Hub"):
        gp.load(fresh("llama"), "hub:nobody/nothing")


@pytest.mark.parametrize(("format", "file"), [("peft", "adapter_config.json"), ("graphpeft", "adapter.json")])
def test_push_makes_the_repository_and_uploads_the_files(
    format: Any, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: dict[str, Any] = {}
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repo_id, **options: done.update(made=repo_id, **options))

    def upload(repo_id: str, folder_path: Path, **options: Any) -> str:
        done.update(repo=repo_id, files=sorted(path.name for path in folder_path.iterdir()), options=options)
        return "url"

    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    model = adapted("llama", "q:lora")
    assert gp.push_to_hub(model, "me/mine", format=format, private=True, token="t", commit_message="first") == "url"
    assert (done["made"], done["repo"], done["private"], done["token"]) == ("me/mine", "me/mine", True, "t")
    assert file in done["files"]
    assert done["options"] == {"token": "t", "commit_message": "first"}


# -- names -----------------------------------------------------------------------------------------------------------


def test_a_selection_takes_what_it_names_and_no_more() -> None:
    every = ["a.q", "a.v", "b.q", "b.v", "x.a.q", ""]
    assert selection(["a.q", "b.q", "x.a.q"], every) == ["q"]
    assert selection(["b.q", "b.v"], every) == ["b.q", "b.v"]
    assert selection(["a.q"], every) == r"a\.q", "as an ending it would take x.a.q too"
    for wanted in (["a.q"], ["b.q", "b.v"], ["a.q", "b.q", "x.a.q"]):
        assert targeted({"target_modules": selection(wanted, every)}, every) == wanted


def test_patterns_give_every_target_its_value() -> None:
    values = {"a.q": 4, "b.q": 4, "a.v": 2, "b.v": 2, "a.o": 1, "b.o": 4}
    common, found = pattern(values)
    assert (common, found) == (4, {"v": 2, r"^a\.o": 1})
    assert {name: looked_up(found, name, common) for name in values} == values


def test_targets_are_those_of_peft() -> None:
    names = ["layers.0.q", "layers.1.q", "layers.1.v", "head.0.q"]
    deeper = [f"model.{name}" for name in names]
    assert targeted({"target_modules": ["q"], "layers_to_transform": [1]}, deeper) == ["model.layers.1.q"]
    assert targeted({"target_modules": ["q"], "layers_to_transform": 0, "layers_pattern": "layers"}, names) == [
        "layers.0.q"
    ]
    assert targeted({"target_modules": ["q"], "exclude_modules": ["0.q"]}, names) == ["layers.1.q"]
    assert targeted({"target_modules": ".*q", "modules_to_save": ["head"]}, names) == ["layers.0.q", "layers.1.q"]
    assert targeted({"target_modules": "all-linear"}, names) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", -1),
        ("r", 4.0),
        ("lora_alpha", "8"),
        ("rank_pattern", ["q"]),
        ("alpha_pattern", {"q": None}),
        ("use_rslora", "false"),
        ("use_dora", "no"),
        ("modules_to_save", 5),
    ],
    ids=str,
)
def test_a_field_of_another_kind_is_named(field: str, value: Any, tmp_path: Path) -> None:
    theirs("llama", LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(FileError, match=rf"adapter_config\.json: its {field} is"):
        gp.load(fresh("llama"), tmp_path)


def test_a_type_that_is_no_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": ["LORA"]}')
    with pytest.raises(FileError, match="its peft_type is"):
        gp.load(fresh("llama"), tmp_path)
