"""What holds for every method, by the examples in its own file."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from checks import Snapshot, adapters, build, call, delta, outputs, randomize, same, sampled
from exports import tiny
from torch import Tensor

import graphpeft as gp
from graphpeft.chain import RankGate
from graphpeft.ir.weights import site_matrix
from graphpeft.methods import builtin
from graphpeft.rewrite.state import chains

METHODS = {rule: rank for method in builtin() for rule, rank in (method.examples or {method.name: None}).items()}
"""What each method's file gives as examples: rules and the rank of a trained update."""
SAMPLES = {rule: rank for rule, rank in METHODS.items() if "quantize" not in rule}


FAMILY = {rule: rule.partition("(")[0] for rule in METHODS}
FIRST_OF = {method: rule for rule, method in reversed(FAMILY.items())}
VARIANTS = [rule for rule, method in FAMILY.items() if FIRST_OF[method] != rule]
"""All examples but the first of each method."""


# gpt2: q and v are rows of one transposed weight. Other models: tests/behaviors.
@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", sampled(METHODS, *(v for v in VARIANTS if FAMILY[v] in ("rlora", "lora"))))
def test_life(name: str, method: str, tmp_path: Path) -> None:
    model = build(name)
    example, before = call(name, model), Snapshot.of(model)
    base = outputs(model, example)
    gp.apply(model, f"qv:{method}", verify="full")  # identity, gradients, merge and un-merge
    model.eval()
    randomize(model)
    adapted = outputs(model, example)
    assert delta(adapted, base) > 1e-3
    for site, chain in chains(model, "default").items():
        update = chain.delta(site_matrix(model, site) if chain.needs_base_weight else None)
        # Singular values below 1e-5 of the largest are rounding in float32.
        rank = torch.linalg.matrix_rank(update, rtol=1e-5)
        assert rank == METHODS[method] or METHODS[method] is None
        assert rank <= chain.rank
    gp.save(model, tmp_path)
    assert same(outputs(gp.load(build(name), tmp_path).eval(), example), adapted)
    assert same(outputs(copy.deepcopy(model), example), adapted)
    with gp.disabled(model):
        assert same(outputs(model, example), base)
    gp.merge(model)
    # float32, updates of size about 1 through two layers.
    assert delta(outputs(model, example), adapted) < 1e-3
    gp.unmerge(model)
    assert same(outputs(model, example), adapted)
    gp.remove(model)
    before.check(model)


@pytest.mark.parametrize("method", sampled(SAMPLES, *(v for v in VARIANTS if v in SAMPLES)))
def test_the_same_seed_gives_the_same_adapter_in_any_order(method: str) -> None:
    """Of attachment, and whatever else is drawn in between."""
    x = torch.randn(2, 7, 32)
    together = gp.apply(build("hand_written"), f"qv:{method}", seed=3, inputs=(x,))
    apart = build("hand_written")
    torch.manual_seed(99)
    gp.apply(apart, f"v:{method}", seed=3, name="v", inputs=(x,))
    torch.randn(5)
    gp.apply(apart, f"q:{method}", seed=3, name="q", inputs=(x,))
    tensors = {
        (site.key, leaf): tensor
        for name in ("q", "v")
        for site, chain in chains(apart, name).items()
        for leaf, tensor in chain.state_dict().items()
    }
    found = {
        (site.key, leaf): t
        for site, chain in chains(together, "default").items()
        for leaf, t in chain.state_dict().items()
    }
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in found)
    # Frozen tensors are no part of a state dict. VeRA's are as wide as the widest site of an adapter, as in PEFT, so
    # those of adapters on other sites differ.
    if not method.startswith("vera"):
        for site, chain in chains(together, "default").items():
            other = chains(apart, site.role)[site]
            assert torch.equal(chain.eval()(x), other.eval()(x))
    other = gp.apply(build("hand_written"), f"qv:{method}", seed=4, inputs=(x,))
    drawn = [
        t
        for a, b in zip(adapters(together).values(), adapters(other).values(), strict=True)
        for t in [torch.equal(a, b)]
    ]
    fixed = method.startswith(("olora", "pissa", "vera", "rlora"))  # no trained tensor is drawn
    assert all(drawn) == fixed


NEW_OPERATORS = {"rlora(r=16)", "blora(r=4)", "dora(r=4)"}
FIRST = sampled(SAMPLES, *(m for m in SAMPLES if m not in NEW_OPERATORS))
"""By default those methods alone that bring operators which no other has."""


@pytest.mark.parametrize("method", FIRST)
def test_exported_code_has_nothing_that_only_training_needs(method: str) -> None:
    model = gp.apply(tiny("llama"), f"qv:{method}")
    randomize(model)
    model.eval()
    example = call("llama", model)
    adapted = outputs(model, example)
    for module in model.modules():
        assert not isinstance(module, RankGate) or not module.training
    exported = torch.export.export(model, *example[:1], {**example[1], "use_cache": False}, strict=False)
    drawn = {str(n.target) for n in exported.graph.nodes if "rand" in str(n.target) or "dropout" in str(n.target)}
    assert not drawn
    # float32 in the same order.
    assert delta(outputs(exported.module(), (example[0], {**example[1], "use_cache": False}))[:1], adapted[:1]) < 1e-5
    gp.merge(model)
    assert not any(p for p, _ in model.named_parameters() if "adapters" in p)


@pytest.mark.parametrize("method", sampled(SAMPLES, *(m for m in SAMPLES if m not in NEW_OPERATORS or "blora" in m)))
def test_a_compiled_model_has_no_graph_break(method: str) -> None:
    """Nor do its steps of training, whose backward pass is traced too, differ from those of the model as it is."""
    torch._dynamo.reset()
    model = gp.apply(tiny("llama"), f"qv:{method}")
    randomize(model)
    args, kwargs = call("llama", model)
    expected = outputs(model.eval(), (args, kwargs))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert delta(outputs(compiled, (args, kwargs)), expected) < 1e-5  # float32
    model.train()
    found: list[list[Tensor]] = []
    for run in (model, compiled):
        torch.manual_seed(0)  # B-LoRA draws its gates
        model.zero_grad(set_to_none=True)
        run(*args, **kwargs).logits.square().mean().backward()
        found.append([p.grad for p in adapters(model).values() if p.grad is not None])
    assert len(found[0]) == len(found[1]) == len(adapters(model))
    assert any(grad.any() for grad in found[0])
    scale = max(float(grad.abs().max()) for grad in found[0])
    assert delta(*found) < 1e-5 * scale  # float32
