"""DoRA against its formula and against PEFT, on plain, fused and transposed weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from checks import Snapshot, build, call, delta, outputs, randomize, same
from torch import nn

import graphpeft as gp
from graphpeft.errors import AdapterError, ExportError
from graphpeft.ir.site import Site
from graphpeft.ir.weights import site_matrix
from graphpeft.methods import DoRA, LoRA
from graphpeft.rewrite.state import chains


def test_update_is_that_of_the_paper() -> None:
    weight = torch.randn(10, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chain = DoRA(r=3, alpha=6).chain(Site("q", "q.weight", None, False, 0, (10, 12))).double()
    chain.reset(0, "q", weight)
    assert not chain.delta(weight).any()  # to the bit
    for parameter in chain.parameters():
        nn.init.normal_(parameter)
    b, a = (factor.weight for factor in chain.factors)
    whole = weight + 2 * b @ a
    m = chain.reweight.magnitude.weight
    expected = m[:, None] * whole / whole.norm(dim=1, keepdim=True)
    # float64, short sums.
    torch.testing.assert_close(weight + chain.delta(weight), expected, atol=1e-12, rtol=0)
    assert (weight + chain.delta(weight)).norm(dim=1).tolist() == pytest.approx(m.abs().tolist())
    assert chain.rank == 10
    assert chain.trainable() == 3 * 22 + 10
    with pytest.raises(AdapterError, match="depends on the base weight, so it is no LoRA pair"):
        chain.to_lora()


def test_zero_rows_stay_zero() -> None:
    weight = torch.zeros(4, 6)
    chain = DoRA(r=2).chain(Site("q", "q.weight", None, False, 0, (4, 6)))
    chain.reset(0, "q", weight)
    assert not chain.delta(weight).any()


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_starts_and_trains_the_same(rslora: bool) -> None:
    import peft

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6))
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], use_dora=True, use_rslora=rslora)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    x, target = torch.randn(32, 12), torch.randn(32, 6)
    ours = gp.apply(base, f"path(0.weight):dora(r=3, alpha=6, rslora={str(rslora).lower()})", inputs=x)
    (chain,) = chains(ours, "default").values()
    layer = theirs.base_model.model[0]
    assert torch.allclose(chain.reweight.magnitude.weight, layer.lora_magnitude_vector["default"].weight)
    with torch.no_grad():
        chain.factors[1].weight.copy_(layer.lora_A["default"].weight)
        for weight in (layer.lora_B["default"].weight, chain.factors[0].weight):
            torch.manual_seed(1)
            nn.init.normal_(weight)
    # float32, one sum more per product.
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(10):
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][0] - losses[0][-1] > 1e-2
    # float32; Adam divides by the size of gradients, so that their rounding grows a little with each step.
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])  # gpt2: transposed storage, rows of a fused weight
def test_on_models(name: str, tmp_path: Path) -> None:
    model = build(name)
    example, before = call(name, model), Snapshot.of(model)
    base = outputs(model, example)
    gp.apply(model, "qvo:dora(r=4)", verify="full")
    forms = {entry.form(): entry.site.rows for entry in gp.plan(build(name), "qvo:dora").entries}
    assert all((form == "weight") == (rows is not None) for form, rows in forms.items())
    model.eval()
    assert same(outputs(model, example), base)
    randomize(model)
    adapted = outputs(model, example)
    assert delta(adapted, base) > 1e-2
    gp.save(model, tmp_path)
    assert same(outputs(gp.load(build(name), tmp_path).eval(), example), adapted)
    for site, chain in chains(model, "default").items():
        weight = site_matrix(model, site)
        rows = chain.delta(weight)
        rows = rows if site.rows is None else torch.cat([rows[a:b] for a, b in site.rows])
        # float32 norms of 64 entries.
        torch.testing.assert_close(
            (weight + rows).norm(dim=1), chain.reweight.magnitude.value.abs(), atol=1e-5, rtol=1e-4
        )
        assert site.rows is None or not torch.equal(rows, torch.zeros_like(rows))
    gp.verify(model)
    gp.merge(model)
    # float32; the weight form adds the same update to the same weight.
    assert delta(outputs(model, example), adapted) < 1e-5
    gp.unmerge(model)
    assert same(outputs(model, example), adapted)
    with pytest.raises(AdapterError, match=r"Adapter 'default' at .*depends on the base weight"):
        gp.lower(model)
    with pytest.raises(ExportError, match="can be exported with merged=True"):
        gp.export(model, tmp_path / "onnx")
    gp.remove(model)
    before.check(model)


def test_beside_a_half_precision_layer() -> None:
    model = gp.apply(build("llama", dtype=torch.bfloat16), "qv:dora(r=4)")
    randomize(model)
    model.eval()
    example = call("llama", model)
    adapted = outputs(model, example)
    gp.merge(model)
    # Weights and activations round to 8 bits in other places: as much as two layers make of 2^-8, relative to outputs below 4.
    assert delta(outputs(model, example), adapted) < 2**-4
    gp.unmerge(model)
    with gp.disabled(model):
        assert delta(outputs(model, example), adapted) > 2**-3


def test_of_a_stack_of_experts_each_has_its_own_norms() -> None:
    from graphpeft.chain import Stack

    weight = torch.randn(3, 10, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    site = Site("experts.up", "experts.up", None, False, 0, (10, 12), "weight", stack=3)
    stack = Stack(DoRA(r=2).chain(site), 3).double()
    stack.reset(0, "experts.up", weight)
    assert not stack.delta(weight).any()
    for parameter in stack.parameters():
        nn.init.normal_(parameter)
    norms = (weight + stack.delta(weight)).norm(dim=-1)
    torch.testing.assert_close(norms, stack.reweight.magnitude.value.abs(), atol=1e-12, rtol=0)


def test_it_starts_at_a_gain_of_one_to_the_bit() -> None:
    chain = DoRA(r=4).chain(Site("q", "q.weight", None, False, 0, (4096, 64)))
    for seed in range(60):  # √(x²) of some 1 in 100,000 is off by a bit where torch takes its square root from MKL
        weight = torch.rand(4096, 64, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed / 10 - 3)
        chain.reset(0, "q", weight)
        assert torch.equal(chain.row_scale(weight), torch.ones(4096))


def test_without_its_length_it_is_lora() -> None:
    """The gradient at the start, where the norms are constants: that of LoRA for B, none for A."""
    weight = torch.randn(10, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    site, x = Site("q", "q.weight", None, False, 0, (10, 12)), torch.randn(5, 12, dtype=torch.float64)
    gradients = []
    for method in (DoRA(r=3), LoRA(r=3)):
        chain = method.chain(site).double()
        chain.reset(0, "q", weight)
        (x @ (weight + chain.delta(weight)).T).square().sum().backward()
        gradients.append([factor.weight.grad for factor in chain.factors])
    for dora, lora in zip(*gradients, strict=True):
        torch.testing.assert_close(dora, lora, atol=1e-10, rtol=0)
