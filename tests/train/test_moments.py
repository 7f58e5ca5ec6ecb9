"""The bound's constant K against its definition, and losses under noise."""

from __future__ import annotations

from math import exp, sqrt

import pytest
import torch
from checks import build, call, outputs, randomize, same
from torch.nn import functional as F

import graphpeft as gp
from graphpeft.errors import RuleError
from graphpeft.train import estimate_K, perturbed_losses
from graphpeft.train.moments import GAMMAS


def holds(losses: torch.Tensor, K: float) -> bool:
    below = (losses.mean(-1, keepdim=True) - losses).double()
    return all((g * below).exp().mean() <= exp(1.5 * K**2 * g**2) for g in GAMMAS)


def test_estimate_is_the_smallest_that_holds() -> None:
    losses = torch.rand(5, 40) * torch.arange(1, 6).unsqueeze(1)
    K = estimate_K(losses)
    assert holds(losses, K * (1 + 1e-9))  # float64
    assert not holds(losses, K * (1 - 1e-9))


def test_estimate_of_known_losses() -> None:
    # E exp(γ (μ − ℓ)) = exp(γ² s² / 2) for a Gaussian, so K = s / √3; 4·10⁵ samples, γ s <= 1: 1 %.
    gaussian = 0.5 + 0.1 * torch.randn(400_000, dtype=torch.float64)
    assert estimate_K(gaussian) == pytest.approx(0.1 / sqrt(3), rel=0.01)
    assert estimate_K(torch.full((3, 7), 2.5)) == 0
    # Networks whose means differ do not count as spread; γ of 10⁴ overflows nothing.
    assert estimate_K(torch.tensor([[1.0, 1.0], [9.0, 9.0]])) == 0
    assert 0 < estimate_K(torch.tensor([0.0, 5.0]), [1e4]) < 0.02  # √(2/3 · 2.5 / 10⁴)
    for losses, gammas in ((torch.tensor([1.0, torch.inf]), [1.0]), (torch.ones(3), [0.0]), (torch.ones(0), [1.0])):
        with pytest.raises(RuleError, match="at least one loss"):
            estimate_K(losses, gammas)


def test_losses_under_noise() -> None:
    model = gp.apply(build("bert"), "qv:lora(r=4)")
    randomize(model)
    example = call("bert", model)
    mean = outputs(model, example)

    def compute() -> torch.Tensor:
        logits = model(**example[1]).logits
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="none")

    with pytest.raises(RuleError, match="the model has no noise"):
        perturbed_losses(model, compute)
    pac = gp.PAC(examples=20, sigma=0.3).attach(model)
    model.train()
    model.bert.eval()
    modes = [m.training for m in model.modules()]
    losses = perturbed_losses(model, compute, draws=6)
    assert losses.shape == (6, len(mean[0]))
    assert len({row[0].item() for row in losses}) == 6
    assert [m.training for m in model.modules()] == modes
    pac.K = estimate_K(losses)
    assert 0 < pac.K < 5
    assert same(outputs(model.eval(), example), mean)
