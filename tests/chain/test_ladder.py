"""The ladder of bits against the residual form of Bayesian Bits, written out, and against uniform quantizers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphpeft.chain import WIDTHS, Dense, IntCodes, LearnedQuantizer, normal
from graphpeft.chain.gates import probability, sample

OPEN = 5.0


def ladder(weight: Tensor, bits: int = 32, **options: object) -> LearnedQuantizer:
    """A ladder on `weight`'s range whose gates are decided for `bits`."""
    made = LearnedQuantizer(weight.numel(), 0.1, **options).to(weight.dtype)  # type: ignore[arg-type]
    made.reset(weight, lambda name: pytest.fail(f"no random stream is needed, but {name} was asked for"))
    first = WIDTHS[made.free :]
    made.logits.data = torch.tensor([OPEN if width <= bits else -OPEN for width in first], dtype=weight.dtype)
    return made


def residuals(x: Tensor, beta: Tensor, gates: Tensor) -> Tensor:
    """x_2 + z_4 (ε_4 + z_8 (ε_8 + z_16 (ε_16 + z_32 ε_32))), as the paper has it."""
    x = x.clamp(-beta * (1 - 1e-7), beta * (1 - 1e-7))
    step = 2 * beta / 3
    sums = [step * (x / step).round()]
    terms = [sums[0]]
    for bits in (2, 4, 8, 16):
        step = step / (2**bits + 1)
        terms.append(step * ((x - sums[-1]) / step).round())
        sums.append(sums[-1] + terms[-1])
    value = torch.zeros_like(x)
    for term, gate in zip(terms[:0:-1], gates.flip(0), strict=True):
        value = gate * (term + value)
    return terms[0] + value


WEIGHT = torch.randn(40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", WIDTHS)
def test_evaluation_is_one_uniform_quantizer(bits: int) -> None:
    made = ladder(WEIGHT, bits).eval()
    value = made(WEIGHT)
    beta = made.log_range.detach().exp()
    step = 2 * beta / (2.0**bits - 1)
    assert made.bits() == bits
    # Half a step, and at 32 bits what clipping takes from the largest entry.
    assert ((value - WEIGHT).abs() <= step / 2 + 1e-6).all()
    if bits < 32:
        codes = value / step
        # float64 codes up to 2^15.
        torch.testing.assert_close(codes, codes.round(), atol=1e-9, rtol=0)
        assert codes.abs().max() <= 2 ** (bits - 1) - 1
        assert len(codes.round().unique()) <= 2**bits - 1
    else:
        torch.testing.assert_close(value, WEIGHT, atol=0, rtol=1e-14)


def test_training_is_the_residual_ladder() -> None:
    made = ladder(WEIGHT).train()
    made.logits.data = torch.tensor([0.5, 0.0, 0.3, 1.0], dtype=torch.float64)
    torch.manual_seed(3)
    value = made(WEIGHT)
    torch.manual_seed(3)
    gates = sample(made.logits)
    assert ((gates > 0) & (gates < 1)).any()
    # The rung of 32 bits has a step of 1e-9 here, where ours does not round.
    torch.testing.assert_close(value, residuals(WEIGHT, made.log_range.exp(), gates), atol=2e-9, rtol=0)


def test_gradients_reach_weight_range_and_gates() -> None:
    made = ladder(WEIGHT).train()
    made.logits.data = torch.tensor([0.5, 0.0, 0.3, 1.0], dtype=torch.float64)
    made.log_range.data -= 1  # so that entries are clipped
    weight = WEIGHT.clone().requires_grad_()
    made(weight).square().sum().backward()
    inside = WEIGHT.abs() < made.log_range.detach().exp()
    assert weight.grad is not None
    assert (weight.grad[~inside] == 0).all()
    assert (weight.grad[inside] != 0).any()
    assert made.log_range.grad is not None
    assert made.log_range.grad.item() != 0
    assert made.logits.grad is not None
    assert made.logits.grad.any()


def test_a_zero_tensor_has_a_range_and_stays_zero() -> None:
    made = ladder(torch.zeros(8), 2)
    assert made.log_range.item() == 0
    assert not made.eval()(torch.zeros(8)).any()


def test_with_drop_a_tensor_may_go() -> None:
    made = ladder(WEIGHT, 0, drop=True).eval()
    assert made.bits() == 0
    assert not made(WEIGHT).any()
    assert ladder(WEIGHT, 2, drop=True).bits() == 2


def test_penalty_counts_open_gates_or_bit_operations() -> None:
    made = ladder(WEIGHT)
    made.logits.data = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    q = probability(made.logits).detach()
    opened = [q[0], q[0] * q[1], q[0] * q[1] * q[2], q.prod()]
    assert made.penalty(WEIGHT).item() == pytest.approx(0.1 * float(sum(opened)))
    bop = ladder(WEIGHT, cost="bop")
    bop.logits.data = made.logits.data
    pool: dict[str, object] = {}
    bop.join(pool)
    ladder(torch.zeros(60, 40), cost="bop").join(pool)  # twice as large
    weighted = sum(b * o for b, o in zip((4, 8, 16, 32), opened, strict=True))
    assert bop.penalty(WEIGHT).item() == pytest.approx(0.1 * float(weighted) / 2)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_codes_give_what_evaluation_gives_to_the_bit(bits: int) -> None:
    weight = WEIGHT.float()
    made = ladder(weight, bits).eval()
    factor = Dense(40, 30, normal(1.0)).as_codes(bits)
    coded = factor.applied[0]
    assert isinstance(coded, IntCodes)
    factor.weight.copy_(coded.encode(made, weight))
    assert factor.weight.dtype == (torch.int8 if bits <= 8 else torch.int16)
    assert torch.equal(factor.value, made(weight))
    assert not list(factor.parameters())
    assert set(factor.saved()) == {"weight", "transforms.0.step"}
