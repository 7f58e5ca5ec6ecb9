"""OLoRA and PiSSA against their definitions and against PEFT, which changes the base weight where we do not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import Snapshot, build, call, delta, outputs, randomize, same
from torch import nn

import graphpeft as gp
from graphpeft.chain import qr, svd
from graphpeft.errors import AdapterError
from graphpeft.ir.site import Site
from graphpeft.ir.weights import site_matrix
from graphpeft.methods import OLoRA, PiSSA
from graphpeft.rewrite.state import chains


def site(outputs: int, inputs: int) -> Site:
    return Site("q", "layer.q.weight", None, False, 0, (outputs, inputs))


@pytest.mark.parametrize("shape", [(10, 7), (7, 10), (8, 8)])
def test_qr_is_that_of_the_paper(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b, a = qr(weight, 2.0, r=3)
    # float64, short sums.
    torch.testing.assert_close(b.T @ b, torch.eye(3, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close((b @ a)[:, :3], weight[:, :3], atol=1e-12, rtol=0)
    assert (a.diagonal() > 0).all()
    torch.testing.assert_close(a.tril(-1), torch.zeros_like(a), atol=1e-12, rtol=0)


def test_pivoting_does_not_depend_on_the_order_of_features() -> None:
    weight = torch.randn(12, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    b, a = qr(weight, 1.0, r=4, pivot=True)
    again, _ = qr(weight[:, order], 1.0, r=4, pivot=True)
    torch.testing.assert_close(again, b, atol=1e-12, rtol=0)
    torch.testing.assert_close(b.T @ b, torch.eye(4, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (weight - b @ a).norm() < weight.norm()


def test_svd_gives_the_principal_part() -> None:
    weight = torch.randn(12, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b, a = svd(weight, 2.0, r=3)
    u, values, v = torch.linalg.svd(weight)
    torch.testing.assert_close(2.0 * b @ a, (u[:, :3] * values[:3]) @ v[:3], atol=1e-12, rtol=0)
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", [OLoRA(r=4), PiSSA(r=4), OLoRA(r=4, alpha=8, pivot=True)])
def test_update_is_the_difference_of_the_products(method: Any) -> None:
    weight = torch.randn(10, 12, generator=torch.Generator().manual_seed(0))
    chain = method.chain(site(10, 12))
    chain.reset(0, "q", weight)
    left, right = chain.factors
    assert not chain.delta().any()  # to the bit
    assert left.start.any()
    b0, a0 = left.start.clone(), right.start.clone()
    for parameter in chain.parameters():
        nn.init.normal_(parameter)
    expected = chain.scale * (left.weight @ right.weight - b0 @ a0)
    # float32, sums of eight products of size about 1.
    torch.testing.assert_close(chain.delta(), expected, atol=1e-5, rtol=1e-5)
    assert torch.linalg.matrix_rank(chain.delta()) == 8
    assert chain.trainable() == 4 * 22
    x, y = torch.randn(3, 12), torch.randn(3, 10)
    torch.testing.assert_close(chain.accumulate(y, x), y + x @ chain.delta().T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("method", "init"), [("olora", "olora"), ("pissa", "pissa")])
def test_peft_starts_and_trains_the_same(method: str, init: str) -> None:
    import peft

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6))
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=init)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    x = torch.randn(32, 12)
    ours = gp.apply(base, f"path(0.weight):{method}(r=3, alpha=6)", inputs=x)
    target = torch.randn(32, 6)
    (chain,) = chains(ours, "default").values()
    layer = theirs.base_model.model[0]
    # The signs of a decomposition are free: compare the products, then go on from the same factors.
    start = chain.scale * chain.factors[0].start @ chain.factors[1].start
    torch.testing.assert_close(start, layer.get_delta_weight("default"), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(chain.factors[1].weight)
        layer.lora_B["default"].weight.copy_(chain.factors[0].weight)
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


@pytest.mark.parametrize("name", ["gpt2"])  # transposed storage, fused and square weights; others in tests/behaviors
@pytest.mark.parametrize("method", ["olora(r=4)", "pissa(r=4)"])
def test_on_models(name: str, method: str, tmp_path: Path) -> None:
    model = build(name)
    example, before = call(name, model), Snapshot.of(model)
    base = outputs(model, example)
    gp.apply(model, f"qvo:{method}", verify="full")
    model.eval()
    assert same(outputs(model, example), base)
    for place, chain in chains(model, "default").items():
        weight = site_matrix(model, place)
        b0, a0 = (factor.start for factor in chain.factors if hasattr(factor, "start"))
        if method.startswith("olora"):
            # float32: QR reproduces the first columns up to rounding.
            torch.testing.assert_close((b0 @ a0)[:, :4], weight[:, :4], atol=1e-5, rtol=1e-4)
    randomize(model)
    adapted = outputs(model, example)
    assert delta(adapted, base) > 1e-2
    gp.save(model, tmp_path)
    again = gp.load(build(name), tmp_path).eval()
    assert same(outputs(again, example), adapted)
    gp.merge(model)
    # float32, updates of size about 1 on weights of size 0.1 or less, through two layers.
    assert delta(outputs(model, example), adapted) < 1e-3
    gp.unmerge(model)
    assert same(outputs(model, example), adapted)
    gp.remove(model)
    before.check(model)


def test_rank_above_the_site_is_refused() -> None:
    model = build("llama")
    before = Snapshot.of(model)
    with pytest.raises(AdapterError, match=r"asks for rank 65 of .*q_proj\.weight.*64 × 64.*r <= 64"):
        gp.apply(model, "q:olora(r=65)")
    before.check(model)
