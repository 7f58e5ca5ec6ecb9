"""Merging folds an adapter into plain weights; un-merging gives the old ones back, every bit of them."""

from __future__ import annotations

import pytest
import torch
from checks import Snapshot, build, call, delta, inputs, outputs, randomize, same
from torch import nn

import graphpeft as gp
from graphpeft.ir.site import Site
from graphpeft.rewrite.owner import Adapted
from graphpeft.rewrite.state import chains, get_state


@pytest.mark.parametrize("method", ["lora(r=4, alpha=8)", "rlora"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "albert", "torch_encoder", "hand_written"])
def test_merged_is_adapted_and_unmerging_is_exact(name: str, method: str) -> None:
    model = build(name)
    example = call(name, model)
    before = Snapshot.of(model)
    target = "attn" if name == "hand_written" else "linear"
    gp.apply(model, f"{target}:{method}", inputs=inputs(name, model))
    randomize(model, std=0.05)
    with_adapters, adapted = Snapshot.of(model), outputs(model, example)
    scale = max(1.0, *(float(t.abs().max()) for t in adapted))

    gp.merge(model)
    # float32: one rounding per weight, carried through two layers.
    assert delta(outputs(model, example), adapted) < 1e-5 * scale
    plain = Snapshot.of(model)
    assert list(plain.tensors) == list(before.tensors)
    assert plain.modules == before.modules
    assert plain.identities == before.identities
    touched = {n for n in before.tensors if not torch.equal(plain.tensors[n], before.tensors[n])}
    assert touched == {e.site.weight for e in get_state(model).adapters["default"].entries}

    gp.unmerge(model)
    with_adapters.check(model, adapted=True)
    assert same(outputs(model, example), adapted)
    gp.remove(model)
    before.check(model)


def test_many_merges_leave_no_trace() -> None:
    """Subtracting a rounded sum would drift in bfloat16; putting the original back does not."""
    model = build("llama", dtype=torch.bfloat16)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    gp.apply(model, "linear:lora")
    for seed in range(5):
        randomize(model, seed=seed)
        gp.merge(model)
        gp.unmerge(model)
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in base.items())


def test_a_merge_in_half_precision_rounds_once() -> None:
    """Two adapters on one weight: the sum is made in float32, then cast. Casting in between would round twice."""
    model = build("llama", dtype=torch.bfloat16)
    weight = model.model.layers[0].self_attn.q_proj.weight
    base = weight.detach().float().clone()
    for name in ("one", "two"):
        gp.apply(model, "q:lora(r=4)", name=name)
        randomize(model, name, std=0.05, seed=len(name))
    branches = model.model.layers[0].self_attn.q_proj.adapters
    exact = base + branches.one.q.delta().detach() + branches.two.q.delta().detach()
    gp.merge(model, ("one", "two"))
    assert torch.equal(weight, exact.bfloat16())


def test_a_shared_block_is_folded_once() -> None:
    """ALBERT calls one block twice: W + ΔW, not W + 2 ΔW."""
    model = build("albert")
    gp.apply(model, "q:lora")
    randomize(model)
    query = model.albert.encoder.albert_layer_groups[0].albert_layers[0].attention.query
    base, update = query.weight.detach().clone(), query.adapters.default.q.delta().detach()
    gp.merge(model)
    assert torch.equal(query.weight, base + update)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_tied_weight_takes_one_update(name: str) -> None:
    """GPT-2's head is its embedding, T5's three are one: the sum of an update for each place would be wrong in all."""
    model = build(name)
    example = call(name, model)
    base = model.lm_head.weight.detach().clone()
    gp.apply(model, "embed:lora(r=2)", expect=1)
    randomize(model)
    (chain,) = chains(model, "default").values()
    adapted = outputs(model, example)
    gp.merge(model)
    embedding = model.get_input_embeddings()
    assert model.lm_head.weight is embedding.weight
    # float32: one rounding of the sum
    assert torch.allclose(embedding.weight, base + chain.delta(), atol=1e-6)
    assert delta(outputs(model, example), adapted) < 1e-5 * max(float(t.abs().max()) for t in adapted)
    gp.unmerge(model)
    assert same(outputs(model, example), adapted)


def test_an_untied_head_merges() -> None:
    model = build("llama")
    example = call("llama", model)
    gp.apply(model, "path(lm_head):lora")
    randomize(model)
    adapted = outputs(model, example)
    gp.merge(model)
    assert delta(outputs(model, example), adapted) < 1e-5
    assert not any(isinstance(m, Adapted) for m in model.modules())


def test_a_shared_module_merges() -> None:
    """One module under two names holds one tensor once: nothing is tied to anything that the adapter misses."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = self.first

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(x)))

    model, x = Twice(), torch.randn(3, 8)
    base = model(x)
    gp.apply(model, "path(first):lora", inputs=(x,), expect=1)
    randomize(model)
    adapted = model(x)
    gp.merge(model)
    assert delta([model(x)], [adapted]) < 1e-5
    gp.unmerge(model)
    gp.remove(model)
    assert torch.equal(model(x), base)


def test_a_site_of_a_transposed_weight_folds_transposed() -> None:
    model = build("gpt2")
    gp.apply(model, "v:lora")
    randomize(model)
    layer = model.transformer.h[0].attn.c_attn
    base, branch = layer.weight.detach().clone(), layer.adapters.default.v
    site: Site = get_state(model).adapters["default"].entries[0].site
    _, B, A = branch.factors
    expected = base.clone()
    expected[:, 128:192] += (B.weight @ A.weight).T.detach()
    gp.merge(model)
    assert site.transposed
    # float32: one product of rank 8 in another order.
    assert delta([layer.weight], [expected]) < 1e-6
    assert torch.equal(layer.weight[:, :128], base[:, :128])
