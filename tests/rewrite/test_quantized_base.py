"""Adapters on quantized bases: torchao's tensors and bitsandbytes' modules, on the CPU.

The oracle is a twin in floats: the same model with the weights that the quantized ones stand for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import Snapshot, adapters, build, delta, floats, outputs, randomize, same
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from zoo import llama

import graphpeft as gp
from graphpeft.compat.quantized import FAST, library, quantized
from graphpeft.errors import AdapterError, ExportError, FileError
from graphpeft.ir.weights import float_weight
from graphpeft.rewrite.requantize import Requantized

torchao = pytest.importorskip("torchao.quantization")
CONFIGS: dict[str, Callable[[], Any]] = {
    "int8": torchao.Int8WeightOnlyConfig,
    "int4": lambda: torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(32)),
    "float8": torchao.Float8WeightOnlyConfig,
}


def kinds(*always: str, rest: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kind", [*always, *(pytest.param(kind, marks=pytest.mark.slow) for kind in rest)])


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*:FutureWarning", "ignore:MatMul8bitLt:UserWarning", "ignore:.*register_constant:FutureWarning"
)
Example = tuple[tuple[Any, ...], dict[str, Any]]


def quantize(model: nn.Module, kind: str, fast: bool = False) -> nn.Module:
    """Every `nn.Linear` but the head quantized in place, as transformers leaves it out."""

    def chosen(module: nn.Module, path: str) -> bool:
        return type(module) is nn.Linear and "lm_head" not in path

    if kind in CONFIGS or kind == "dynamic":
        config = torchao.Int8DynamicActivationInt8WeightConfig() if kind == "dynamic" else CONFIGS[kind]()
        torchao.quantize_(model, config, chosen)
        return model
    bnb = pytest.importorskip("bitsandbytes")
    for path, module in list(model.named_modules()):
        if chosen(module, path):
            assert isinstance(module, nn.Linear)
            size = module.in_features, module.out_features, module.bias is not None
            made = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False) if kind == "bnb8" else bnb.nn.LinearNF4(*size)
            made.load_state_dict(module.state_dict())
            if kind == "bnb4" and not fast:
                setattr(
                    made, FAST, False
                )  # which some CPUs have, for widths in blocks of 64, and which rounds to bfloat16
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, made.to("cpu").eval())
    return model


def base(kind: str, dtype: torch.dtype = torch.float32, name: str = "llama") -> nn.Module:
    return quantize(build(name, dtype=dtype), kind)


def twin(model: nn.Module, name: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same model in floats, with the weights that the quantized ones stand for."""
    made = build(name, dtype=dtype)
    for path in quantized(model):
        made.get_parameter(path).data.copy_(float_weight(model, path))
    return made


def call(seed: int = 0) -> Example:
    return (), {"input_ids": torch.randint(3, 128, (2, 7), generator=torch.Generator().manual_seed(seed))}


def seen(model: nn.Module, path: str) -> tuple[Tensor, Tensor]:
    """What a module reads and what it returns, during a call of the model."""
    found: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_hook(lambda _, given, result: found.extend((given[0], result)))
    outputs(model, call())
    hook.remove()
    return found[0], found[1]


@kinds("int8", "bnb8", "bnb4", rest=("int4", "float8"))
def test_the_base_and_the_adapter_beside_it(kind: str) -> None:
    model = base(kind)
    before = outputs(model, call())
    assert list(gp.sites(model)) == list(gp.sites(build("llama"))), "roles and sizes are those of the float model"
    gp.apply(model, "qv:lora(r=4, alpha=8); mlp:lora(r=2)", expect=10)
    assert same(outputs(model, call()), before), "a fresh adapter changes nothing"
    assert {p.dtype for p in adapters(model).values()} == {torch.float32}
    randomize(model)
    assert delta(outputs(model, call()), before) > 0.1

    path = "model.layers.1.self_attn.q_proj"
    x, y = seen(model, path)
    a, b = (adapters(model)[f"{path}.adapters.default.q.factors.{i}.weight"] for i in (1, 0))
    with gp.disabled(model):
        assert same(outputs(model, call()), before)
        plain = model.get_submodule(path)(x)
    # One product of width 64 in float32, summed in another order.
    assert delta([y], [plain + 2 * (x @ a.T @ b.T)]) < 1e-5 * float(y.abs().max())
    gp.remove(model)
    assert same(outputs(model, call()), before)


@kinds("bnb4", rest=("int8",))
def test_half_precision(kind: str) -> None:
    model = base(kind, torch.bfloat16)
    before = outputs(model, call())
    gp.apply(model, "qv:lora; mlp:dora")
    assert same(outputs(model, call()), before)
    assert {p.dtype for p in adapters(model).values()} == {torch.float32}
    randomize(model)
    assert {t.dtype for t in outputs(model, call())} == {torch.bfloat16}
    moved = delta(outputs(model, call()), before)
    plain = twin(model, dtype=torch.bfloat16)
    rest = outputs(plain, call())
    gp.apply(plain, "qv:lora; mlp:dora")
    randomize(plain)
    wanted = outputs(plain, call())
    assert abs(moved - delta(wanted, rest)) < 0.1 * moved
    # Rounding of activations to bfloat16, at other places in the two: two steps of the largest number.
    assert delta(outputs(model, call()), wanted) <= 2 * 2**-8 * max(float(t.abs().max()) for t in wanted)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    args, kwargs = call()
    model.zero_grad()
    floats(model(*args, **kwargs))[0].pow(2).mean().backward()
    return {n: p.grad for n, p in adapters(model).items() if p.grad is not None}


@kinds("bnb4", rest=("int8", "int4", "float8", "bnb8"))
def test_gradients_are_those_of_the_twin_in_floats(kind: str) -> None:
    model = base(kind)
    plain = twin(model)
    for each in (model, plain):
        gp.apply(each, "qkvo:lora(r=4); mlp:dora(r=2)")
        randomize(each)
    found, wanted = gradients(model), gradients(plain)
    assert found.keys() == wanted.keys() == adapters(model).keys()
    # int8 of bitsandbytes rounds activations to 8 bits on the way forward; the others compute with the floats themselves,
    # in float8 scaled behind the product rather than before.
    limit = 0.1 if kind == "bnb8" else 1e-3
    for name, gradient in wanted.items():
        assert gradient.any()
        assert torch.linalg.norm(found[name] - gradient) < limit * torch.linalg.norm(gradient), name


def test_it_trains() -> None:
    model = base("bnb4")
    rest = {n: p.detach().clone() for n, p in model.named_parameters()}
    gp.apply(model, "linear:lora(r=8)").train()
    (_, kwargs), losses = call(), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(12):
        loss = model(**kwargs, labels=kwargs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5, "a chance in 128 costs 4.9"
    assert all(torch.equal(p, rest[n]) for n, p in model.named_parameters() if n in rest)


def test_a_weight_that_a_fast_kernel_reordered(tmp_path: Path) -> None:
    """bitsandbytes reorders 4-bit weights when they are first used without gradients, and hands no gradient on after that."""
    functional = pytest.importorskip("bitsandbytes.functional")
    if not functional.has_avx512bf16():
        pytest.skip("this processor has no such kernel")

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return quantize(llama(intermediate_size=128).eval(), "bnb4", fast=True)

    def reordered(model: nn.Module) -> set[bool]:
        layers = [m for m in model.modules() if hasattr(m, FAST)]
        return {bool(getattr(m.weight.quant_state, "packing_format_for_cpu", False)) for m in layers}

    model = fresh()
    before = outputs(model, call())
    assert reordered(model) == {True}, "or this test shows nothing"
    gp.apply(model, "qv:lora")
    # Their kernel computes in bfloat16, steps of 2^-8, through two layers.
    near = 2**-6 * max(float(t.abs().max()) for t in before)
    assert delta(outputs(model, call()), before) < near
    randomize(model)
    moved = outputs(model, call())
    assert delta(moved, before) > 4 * near
    assert reordered(model) == {False}

    gradient = gradients(model)
    assert len(gradient) == len(adapters(model)), "as after an evaluation in the middle of training"
    assert all(g.any() for g in gradient.values()), "those of the first layer too"
    gp.save(model, tmp_path / "a")
    other = fresh()  # never used: its scales were never rounded
    assert delta(outputs(gp.load(other, tmp_path / "a"), call()), moved) < near
    gp.remove(model)
    assert delta(outputs(model, call()), before) < near
    assert reordered(model) == {True}, "as fast as it came"


@kinds("int8", rest=("bnb8", "int4", "bnb4"))
def test_methods_start_from_the_floats_that_the_weight_stands_for(kind: str) -> None:
    model = base(kind)
    outputs(model, call())  # after it bitsandbytes keeps the scales elsewhere
    plain = twin(model)
    rules = "q:olora(r=4); k:pissa(r=4); v:vera(r=8); gate:rlora; down:melora(n=2, r=2); up:dora(r=4)"
    gp.apply(model, rules, seed=3)
    gp.apply(plain, rules, seed=3)
    made, wanted = adapters(model), adapters(plain)
    assert made.keys() == wanted.keys()
    assert same(made.values(), wanted.values())
    for each in (model, plain):
        randomize(each, std=0.1)
    # As above: bitsandbytes' int8 rounds activations too, by up to 1/254 of the largest.
    limit = 0.05 if kind == "bnb8" else 1e-4
    moved, held = outputs(model, call()), outputs(plain, call())
    assert delta(moved, held) < limit * float(held[0].abs().max())


@kinds("bnb4", rest=("int4",))
def test_rows_of_a_fused_projection(kind: str) -> None:
    model = base(kind, name="phi3")
    plain = twin(model, "phi3")
    before, snapshot = outputs(model, call()), Snapshot.of(model)
    with pytest.raises(AdapterError, match=r"qkv_proj.weight \(q\) is quantized by .*on every call"):
        gp.apply(model, "q:dora")  # of rows alone, so W + ΔW is formed
    snapshot.check(model)
    for each in (model, plain):
        gp.apply(each, "qv:lora(r=4)", expect=4)
        randomize(each)
    # Sums in another order.
    assert delta(outputs(model, call()), outputs(plain, call())) < 1e-4
    assert delta(outputs(model, call()), before) > 0.01


@kinds("bnb4", rest=("int8", "int4", "bnb8"))
def test_files_copies_and_state_dicts(kind: str, tmp_path: Path) -> None:
    model = base(kind)
    names = list(model.state_dict())
    gp.apply(model, "qv:lora; up:dora")
    randomize(model)
    wanted = outputs(model, call())
    assert [n for n in model.state_dict() if ".adapters." not in n] == names
    gp.save(model, tmp_path / "a")

    clone = copy.deepcopy(model)
    assert same(outputs(clone, call()), wanted)
    randomize(clone, seed=1)
    assert same(outputs(model, call()), wanted), "a copy has tensors of its own"
    assert delta(outputs(clone, call()), wanted) > 0.01
    # bitsandbytes takes no packed weights back into packed modules, adapted or not.
    ours = {n: t for n, t in model.state_dict().items() if kind.startswith("int") or ".adapters." in n}
    clone.load_state_dict(ours, strict=kind.startswith("int"))
    assert same(outputs(clone, call()), wanted)

    again = gp.load(base(kind), tmp_path / "a")
    assert same(outputs(again, call()), wanted), "the same weights, quantized again, are the same base"
    plain = build("llama")
    with pytest.raises(FileError, match=r"other base weights.*one of the two is quantized"):
        gp.load(plain, tmp_path / "a")
    with pytest.warns(UserWarning, match="other base weights"):
        gp.load(plain, tmp_path / "a", any_base=True)
    assert same(adapters(plain).values(), adapters(model).values())
    merged = outputs(plain, call())
    gp.merge(plain)  # the way that the refusals name
    # Sums in another order, over two layers.
    assert delta(outputs(plain, call()), merged) < 1e-4


@kinds("int8", "bnb4", rest=("bnb8",))
def test_peft_on_the_same_base(kind: str, tmp_path: Path) -> None:
    targets = ["q_proj", "v_proj"]
    theirs = get_peft_model(base(kind), LoraConfig(r=4, lora_alpha=8, target_modules=targets)).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = gp.load(base(kind), tmp_path / "theirs")
    wanted = outputs(theirs, call())
    # The same products, the last sum in one kernel here.
    assert delta(outputs(ours, call()), wanted) < 1e-4
    with gp.disabled(ours):
        assert delta(outputs(ours, call()), wanted) > 0.01
    gp.save(ours, tmp_path / "ours", format="peft")
    back = PeftModel.from_pretrained(base(kind), tmp_path / "ours").eval()
    assert delta(outputs(back, call()), wanted) < 1e-4


@kinds("int8", rest=("int4", "float8"))
def test_requantize(kind: str) -> None:
    model = base(kind)
    gp.apply(model, "qv:lora; embed:lora", expect=5)
    randomize(model)
    before, adapted = Snapshot.of(model), outputs(model, call())
    with pytest.raises(AdapterError, match=r"\(and 3 more\) is quantized by torchao.*any_base=True.*requantize="):
        gp.merge(model)
    other = "int8" if kind == "int4" else "int4"
    with pytest.raises(AdapterError, match="Pass the config that the model was quantized by"):
        gp.merge(model, requantize=CONFIGS[other]())
    before.check(model)

    plain = twin(model)
    gp.apply(plain, "qv:lora; embed:lora")
    randomize(plain)
    gp.merge(plain)
    report = gp.merge(model, requantize=CONFIGS[kind]())
    assert isinstance(report, Requantized)
    assert len(report.weights) == 4, "the table of tokens is in floats, and not rounded"
    assert "of the update" in str(report)
    assert list(quantized(model)) == [n for n in dict(model.named_parameters()) if library(model.get_parameter(n))]
    for one in report.weights:
        total, base_weight = plain.get_parameter(one.weight).data, float_weight(twin(base(kind)), one.weight)
        error = float_weight(model, one.weight) - total
        # The report's own arithmetic, in float32.
        assert one.largest == pytest.approx(float(error.abs().max()), rel=1e-3, abs=1e-7)
        assert one.of_weight == pytest.approx(float(error.norm() / total.norm()), rel=1e-3)
        assert one.of_update == pytest.approx(float(error.norm() / (total - base_weight).norm()), rel=1e-3)
        assert 0 < one.of_weight < 0.2, "not more than the coarsest of these formats rounds"
    # What it computes with now is W + ΔW but for that.
    assert delta(outputs(model, call()), outputs(twin(model), call())) > 0, "the embedding is not in the twin"
    assert 0 < delta(outputs(model, call()), adapted) < 0.5 * delta(adapted, outputs(base(kind), call()))
    gp.unmerge(model)
    before.check(model, adapted=True)
    assert same(outputs(model, call()), adapted)


@kinds("bnb4", rest=("bnb8",))
def test_what_cannot_be_merged_or_exported(kind: str, tmp_path: Path) -> None:
    model = base(kind)
    gp.apply(model, "qv:lora")
    randomize(model)
    before = Snapshot.of(model)
    for config in (None, CONFIGS["int8"]()):
        with pytest.raises(AdapterError, match=r"is quantized by bitsandbytes.*quantize the result"):
            gp.merge(model, requantize=config)
    for merged in (False, True):
        with pytest.raises(ExportError, match=r'cannot be translated to ONNX.*any_base=True.*quantize="int4"'):
            gp.export(model, tmp_path / "out", merged=merged)
    assert not (tmp_path / "out").exists()
    before.check(model)


def test_inputs_that_are_rounded_hand_no_gradient_on(tmp_path: Path) -> None:
    trained = base("int8")
    gp.apply(trained, "qv:lora")
    randomize(trained)
    gp.save(trained, tmp_path / "a")
    model = base("dynamic")
    before, snapshot = outputs(model, call()), Snapshot.of(model)
    with pytest.raises(AdapterError, match=r"rounds its input too.*Int8WeightOnlyConfig"):
        gp.apply(model, "qv:lora")
    snapshot.check(model)
    gp.load(model, tmp_path / "a")  # the same int8 weights: to run is no trouble
    moved, wanted = outputs(model, call()), outputs(trained, call())
    assert delta(moved, before) > 0.1
    # Activations in 8 bits.
    assert delta(moved, wanted) < 0.1 * delta(moved, before)


@kinds("bnb4", rest=("int8", "bnb8"))
def test_views_and_checks(kind: str) -> None:
    model = base(kind)
    gp.apply(model, "q:lora; up:dora", verify="full")
    randomize(model)
    report = gp.verify(model)
    assert "quantized weights would be rounded anew" in str(report)
    assert "64 × 64" in str(gp.explain(model))
    assert "adapters" in str(gp.diff(model)) or "lora" in str(gp.diff(model))
    assert gp.to_networkx(model).number_of_nodes() > 20
    before = outputs(model, call())
    gp.lower(gp.remove(model) or gp.apply(model, "q:melora(n=2, r=2)"))
    randomize(model)
    gp.combine(model, {"default": 0.5}, "part", "svd")
    assert delta(outputs(model, call()), before) > 0.01


@kinds("int8", rest=("bnb4", "int4", "float8"))
def test_rows_and_swaps(kind: str, tmp_path: Path) -> None:
    model, want = base(kind), {}
    for seed, name in enumerate(("one", "two")):
        gp.apply(model, "qv:lora(r=4); down:lora(r=2)", name=name)
        randomize(model, name, seed=seed)
    for name in ("one", "two", None):
        gp.activate(model, name)
        want[name] = outputs(model, call())
    assert delta(want["one"], want["two"]) > 0.1
    with gp.per_row(model, ["two", None]):
        rows = outputs(model, call())
    # Products of fewer rows are summed in another order, layer upon layer.
    near = 1e-5 * max(float(t.abs().max()) for t in want["two"])
    assert delta(rows, [torch.stack([a[0], b[1]]) for a, b in zip(want["two"], want[None], strict=True)]) < near

    gp.save(model, tmp_path, "two")
    gp.swap(model, tmp_path, "one")
    gp.activate(model, "one")
    assert same(outputs(model, call()), want["two"])
