"""Hard concrete gates against the closed forms of their distribution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphpeft.chain import Diag, RankGate, normal
from graphpeft.chain.gates import decided, probability, sample

LOGITS = torch.tensor([-3.0, -1.0, 0.0, 2.0, 6.0], dtype=torch.float64)


def test_a_gate_is_zero_as_often_as_its_probability_says() -> None:
    torch.manual_seed(0)
    drawn = sample(LOGITS.expand(40_000, -1))
    assert ((drawn >= 0) & (drawn <= 1)).all()
    # A share of 40,000 draws has a standard error of at most 0.0025; four of them.
    torch.testing.assert_close((drawn > 0).double().mean(0), probability(LOGITS), atol=0.01, rtol=0)
    # σ(φ - τ ln(-γ/ζ)) with τ = 2/3, γ = -0.1, ζ = 1.1; figures as computed from that formula by hand.
    torch.testing.assert_close(probability(LOGITS)[2:].float(), torch.tensor([0.832, 0.973, 0.9995]), atol=5e-4, rtol=0)


def test_evaluation_closes_what_is_zero_in_a_third_of_all_draws() -> None:
    logits = torch.tensor([-0.936, -0.935])
    assert decided(logits).tolist() == [0, 1]
    assert (1 - probability(logits)).tolist() == pytest.approx([0.34, 0.34], abs=1e-3)


def test_the_gradient_of_a_sample_is_that_of_finite_differences() -> None:
    def draw(logits: Tensor) -> Tensor:
        torch.manual_seed(0)
        return sample(logits).sum()

    logits = torch.tensor([-0.5, 0.0, 0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(draw, (logits,))


def gated(r: int, **options: object) -> tuple[Diag, RankGate]:
    diag = Diag(r, normal(1.0))
    gate = RankGate(r, 0.5, **options)  # type: ignore[arg-type]
    diag.with_transforms(gate).double()
    torch.nn.init.normal_(diag.weight)
    return diag, gate


def test_ranks_are_a_prefix() -> None:
    diag, gate = gated(5)
    gate.logits.data = torch.tensor([4.0, 4.0, -4.0, 4.0], dtype=torch.float64)
    diag.eval()
    assert diag.value.tolist() == [*diag.weight.tolist()[:3], 0, 0]
    assert gate.kept() == 3
    diag.train()
    gate.logits.data.zero_()
    for _ in range(20):
        kept = (diag.value != 0).tolist()
        assert kept == sorted(kept, reverse=True)
        assert kept[0]
    _, gate = gated(5, drop=True)
    gate.logits.data.fill_(-4.0)
    assert gate.kept() == 0


def test_penalty_of_ranks() -> None:
    diag, gate = gated(4)
    gate.logits.data = torch.tensor([3.0, 0.0, -1.0], dtype=torch.float64)
    q = probability(gate.logits)
    assert gate.penalty(diag.weight).item() == pytest.approx(0.5 * q.mean().item())
    _, nested = gated(4, nested=True)
    nested.logits.data = gate.logits.data
    expected = (q[0] + q[0] * q[1] + q[0] * q[1] * q[2]) / 3
    assert nested.penalty(diag.weight).item() == pytest.approx(0.5 * expected.item())
    assert gated(1)[1].penalty(diag.weight) is None
