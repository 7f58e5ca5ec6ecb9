"""Applying an adapter changes nothing until it is trained, trains what was planned, and comes off without a trace."""

from __future__ import annotations

import pytest
import torch
from checks import CASES, Snapshot, adapters, build, call, delta, floats, inputs, outputs, randomize, same, sampled
from expected_roles import BARE, expected
from torch import nn
from zoo import gpt2, llama

import graphpeft as gp
from graphpeft.errors import AdapterError

LINEAR = {"q", "k", "v", "o", "gate", "up", "down"}
"""What the alias `linear` names."""


def planned(name: str, roles: str, trained: tuple[int, ...]) -> set[str]:
    """Names of the parameters that an adapter has to have, by the table of roles.

    `trained` are the places of the trained factors in a chain; a fused projection's chain has a `Scatter` in front.
    """
    found = set()
    for text, weight, runs in expected(name):
        role = text.split()[0]
        if role not in roles.split():
            continue
        owner, _, leaf = weight.rpartition(".")
        slot = f"{leaf}_{role}" if leaf in BARE else role
        home = ".".join(filter(None, (owner, "adapters.default", slot)))
        found |= {f"{home}.factors.{place + bool(runs)}.weight" for place in trained}
    return found


EAGER = [case for case in CASES if case[1] == "eager" and (case[0], "sdpa") in CASES]
LIKE = [("t5_gated", "sdpa"), ("falcon_new", "sdpa"), ("qwen3", "sdpa"), ("roberta", "sdpa")]


@pytest.mark.parametrize("case", sampled(CASES, *EAGER, *LIKE), ids="-".join)
def test_life_of_an_adapter(case: tuple[str, str]) -> None:
    name, attn = case
    model = build(name, attn)
    example = call(name, model)
    before, base = Snapshot.of(model), outputs(model, example)

    assert gp.apply(model, "qv:rlora", inputs=inputs(name, model)) is model
    assert same(outputs(model, example), base)
    assert set(before.tensors) <= set(model.state_dict())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == planned(name, "q v", trained=(0, 2))

    randomize(model)
    args, kwargs = example
    loss = sum(t.pow(2).sum() for t in floats(model(*args, **kwargs)))
    loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == planned(name, "q v", trained=(0, 2))
    assert all(p.grad.abs().max() > 0 for p in adapters(model).values())
    model.zero_grad(set_to_none=True)

    adapted = outputs(model, example)
    assert delta(adapted, base) > 1e-4  # 100 times the noise of float32 at outputs of size 1
    with gp.disabled(model):
        assert same(outputs(model, example), base)
    assert same(outputs(model, example), adapted)

    gp.remove(model)
    before.check(model)
    assert same(outputs(model, example), base)


DTYPES = [(name, dtype) for dtype in ("bfloat16", "float64") for name in ("llama", "gpt2", "bert")]


@pytest.mark.parametrize("case", sampled(DTYPES, ("gpt2", "float64"), ("bert", "float64")), ids="-".join)
def test_other_dtypes_are_restored_to_the_bit(case: tuple[str, str]) -> None:
    name, dtype = case[0], getattr(torch, case[1])
    model = build(name, dtype=dtype)
    example = call(name, model)
    before, base = Snapshot.of(model), outputs(model, example)
    gp.apply(model, "attn:lora(r=4); up+down:rlora")
    assert {p.dtype for p in adapters(model).values()} == {torch.float32 if dtype == torch.bfloat16 else dtype}
    assert same(outputs(model, example), base)
    randomize(model)
    adapted = outputs(model, example)
    assert {t.dtype for t in adapted} == {dtype}
    with gp.disabled(model):
        assert same(outputs(model, example), base)
    gp.merge(model)
    assert delta(outputs(model, example), base) > 0
    gp.unmerge(model)
    assert same(outputs(model, example), adapted)
    gp.remove(model)
    before.check(model)
    assert same(outputs(model, example), base)


@pytest.mark.parametrize("name", ["llama", "gpt2", "albert", "torch_encoder"])
def test_branches_compute_what_the_dense_update_says(name: str) -> None:
    """Against the definition: weights replaced by W + ΔW, by hand."""
    model = build(name).double()
    example = call(name, model)
    gp.apply(model, "linear:lora(r=4, alpha=6)", inputs=inputs(name, model))
    randomize(model)
    adapted = outputs(model, example)
    updates = {}
    for module_name, module in model.named_modules():
        slots = getattr(module, "adapters", None)
        for role, chain in slots.default.items() if isinstance(slots, nn.Module) else ():
            *scatter, B, A = chain.factors
            dense = 6 / 4 * B.weight @ A.weight
            if scatter:
                ((start, stop),) = scatter[0].rows
                dense = torch.cat([torch.zeros(start, 64 if name == "gpt2" else 32).to(dense), dense])
                dense = torch.cat([dense, torch.zeros(scatter[0].outputs - stop, dense.shape[1]).to(dense)])
            leaf = role.rpartition("_")[0] or "weight"
            updates.setdefault(f"{module_name}.{leaf}", []).append(dense.T if name == "gpt2" else dense)
    linear = [role for role, _, _ in expected(name) if role.split()[0] in LINEAR]
    assert sum(map(len, updates.values())) == len(linear)
    gp.remove(model)
    for path, deltas in updates.items():
        model.get_parameter(path).data.add_(sum(deltas))
    # float64: products of 64 terms of size up to 10, through two layers.
    assert delta(outputs(model, example), adapted) < 1e-10


def test_a_plan_is_what_apply_does() -> None:
    model = build("gpt2")
    before = Snapshot.of(model)
    plan = gp.plan(model, "qv:lora(r=4); mlp:rlora")
    before.check(model)
    assert len(plan) == 8
    gp.apply(model, "qv:lora(r=4); mlp:rlora", expect=8)
    assert gp.trainable(model) == (plan.trainable, plan.total)
    text = str(plan)
    assert "8 sites" in text
    assert f"{plan.trainable:,} trainable" in text
    assert "no rule names this role" in text


def test_layers_and_cross_qualifiers_select() -> None:
    model = build("t5")
    layers = gp.plan(model, "qv[layers=1]:lora")
    assert {e.site.layer for e in layers.entries} == {1}
    assert len(layers) == 6
    crossing = gp.plan(model, "q[cross]:lora")
    assert [e.site.weight for e in crossing.entries] == [
        f"decoder.block.{i}.layer.1.EncDecAttention.q.weight" for i in range(2)
    ]
    assert len(gp.plan(model, "q[self]:lora")) == 4


@pytest.mark.parametrize("training", [False, True])
def test_an_adapter_takes_the_mode_of_its_model(training: bool) -> None:
    """`from_pretrained` returns models in eval mode; an adapter's dropout has to be off there too."""
    model = build("llama").train(training)
    example = call("llama", model)
    gp.apply(model, "qv:lora(dropout=0.5)")
    randomize(model)
    assert {m.training for m in model.modules()} == {training}
    assert same(outputs(model, example), outputs(model, example)) is not training
    model.train(not training)
    assert same(outputs(model, example), outputs(model, example)) is training


def test_an_adapter_is_added_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = llama()
    gp.apply(model, "qv:lora(r=8)")
    assert gp.trainable(model)[0] == 2 * 8 * ((64 + 64) + (64 + 32))
    assert all(p.is_meta for p in model.parameters())


def test_sites_are_found_on_an_adapted_model_as_on_its_base() -> None:
    model = build("gpt2")
    base = gp.sites(model)
    gp.apply(model, "qv:lora")
    randomize(model)
    assert list(gp.sites(model)) == list(base)


def test_forward_hooks_and_isinstance_keep_working() -> None:
    model = build("llama")
    layer = model.model.layers[0].self_attn.q_proj
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    gp.apply(model, "q:lora")
    calls.clear()  # the capture ran it too
    outputs(model, call("llama", model))
    assert calls == [1]
    assert isinstance(layer, nn.Linear)
    assert model.model.layers[0].self_attn.q_proj is layer
    assert "Linear" in type(layer).__name__


def test_a_module_that_has_an_attribute_called_adapters_is_refused() -> None:
    model = build("llama")
    model.model.layers[1].self_attn.v_proj.adapters = "mine"
    before = Snapshot.of(model)
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.v_proj already has an attribute 'adapters'"):
        gp.apply(model, "qv:lora")
    before.check(model)


def test_dropout_rate_zero_is_no_module() -> None:
    model = gpt2()
    gp.apply(model, "qv:lora(dropout=0)")
    assert not [n for n, m in model.named_modules() if "adapters" in n and isinstance(m, nn.Dropout)]
