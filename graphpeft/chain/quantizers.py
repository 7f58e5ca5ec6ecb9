"""Learned precision: gates decide whether a tensor is rounded to 2, 4, 8, 16 or 32 bits.

A uniform quantizer of b bits on [-β, β] has 2^b - 1 levels. The levels of b bits are a subset of those of 2b bits,
because 2^2b - 1 = (2^b - 1)(2^b + 1), so the residual sum of Bayesian Bits (van Baalen et al., 2020, arXiv:2005.07093),

    x_2 + z_4 (ε_4 + z_8 (ε_8 + z_16 (ε_16 + z_32 ε_32))),    ε_2b = Q_2b(x) - Q_b(x),

equals the b-bit quantizer if the gates after b are closed. The step of 32 bits is finer than that of float32, so the
32-bit value is the clipped tensor. A signed quantizer of 2 bits has three levels, -2β/3, 0 and 2β/3.

US patent 12,373,697 B2 (Qualcomm, 2025) covers learned bit widths by gated residual quantization; the authors' code for
Bayesian Bits grants no patent rights. Users of this file must decide whether the patent concerns their use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from graphpeft.chain.gates import decided, probability, sample, with_ones
from graphpeft.chain.inits import fill
from graphpeft.chain.transform import Transform

WIDTHS = (2, 4, 8, 16, 32)
Cost = Literal["constant", "bop"]


def quantize(x: Tensor, beta: Tensor, bits: Tensor | int) -> Tensor:
    """`x`, within ±β, rounded to the nearest of 2^bits - 1 levels, with a straight-through gradient."""
    steps = x * ((2.0**bits - 1) / (2 * beta))
    return (steps + (steps.round() - steps).detach()) * (2 * beta / (2.0**bits - 1))


def clip(x: Tensor, beta: Tensor) -> Tensor:
    """`x` clipped to slightly less than ±β, because the ends themselves would round to a level outside."""
    edge = beta * (1 - 2 * torch.finfo(beta.dtype).eps)
    return torch.minimum(torch.maximum(x, -edge), edge)


@dataclass
class Largest:
    """The size of an adapter's largest tensor, to which the cost of bits is relative."""

    macs: int = 1


class LearnedQuantizer(Transform):
    """A quantizer with a learned precision and a learned range β.

    The penalty is `weight` · Σ_b c_b · Π_{j ≤ b} q_j, where q is the probability that a gate is open. Here c_b = 1, or
    with `cost="bop"` c_b = b · (size of the tensor) / (size of the adapter's largest one), which makes the penalty
    proportional to the expected number of bit operations. At least two bits remain, unless `drop` is set: then the
    tensor may become zero. Both sizes are `macs`, the multiply-accumulates per position with the tensor.
    """

    def __init__(
        self, macs: int, weight: float, cost: Cost = "constant", logit: float = 6.0, drop: bool = False
    ) -> None:
        super().__init__()
        self.macs, self.weight, self.cost, self.logit = macs, weight, cost, logit
        self.free = 0 if drop else 1
        self.largest = Largest(macs)
        self.log_range = nn.Parameter(torch.empty(1))
        self.logits = nn.Parameter(torch.empty(len(WIDTHS) - self.free))

    def join(self, pool: dict[str, Any]) -> None:
        self.largest = pool.setdefault("ladder.largest", self.largest)
        self.largest.macs = max(self.largest.macs, self.macs)

    def reset(self, tensor: Tensor, rng: Callable[[str], np.random.RandomState]) -> None:
        """β starts at the largest magnitude, or at 1 for a tensor of zeros, which has no range of its own."""
        peak = float(tensor.detach().abs().max())
        fill(self.log_range, np.full(self.log_range.shape, np.log(peak) + 1e-6 if peak else 0.0))
        fill(self.logits, np.full(self.logits.shape, self.logit))

    def forward(self, x: Tensor) -> Tensor:
        beta = self.log_range.exp()
        x = clip(x, beta)
        if not self.training:
            bits = self._bits()
            return torch.where(bits == WIDTHS[-1], x, quantize(x, beta, bits)) * (bits > 1)
        rungs = [*(quantize(x, beta, b) for b in WIDTHS[:-1]), x]
        opened = with_ones(sample(self.logits), self.free).cumprod(-1)
        value = opened[..., 0] * rungs[0]
        for i in range(1, len(WIDTHS)):
            value = value + opened[..., i] * (rungs[i] - rungs[i - 1])
        return value

    def _bits(self) -> Tensor:
        """The number of bits in evaluation, shape (1,); 1 means that the tensor is dropped."""
        return 2.0 ** with_ones(decided(self.logits), self.free).cumprod(-1).sum(-1, keepdim=True)

    def bits(self) -> int:
        """The number of bits in evaluation, 0 for a tensor that is dropped."""
        found = int(self._bits().max())
        return found if found > 1 else 0

    def penalty(self, tensor: Tensor | None) -> Tensor | None:
        if not self.weight:
            return None
        opened = probability(self.logits).cumprod(-1)
        if self.cost == "constant":
            return self.weight * opened.sum()
        share = self.macs / self.largest.macs
        return self.weight * share * (opened * opened.new_tensor(WIDTHS[self.free :])).sum()


class ActivationQuantizer(LearnedQuantizer):
    """A quantizer of activations, whose range starts at the largest magnitude in the first batch of training.

    Before that batch, evaluation does not round.
    """

    def __init__(self, macs: int, weight: float, cost: Cost = "constant", logit: float = 6.0) -> None:
        super().__init__(macs, weight, cost, logit)
        self.known = False

    def reset(self, tensor: Tensor, rng: Callable[[str], np.random.RandomState]) -> None:
        super().reset(tensor, rng)
        fill(self.log_range, np.full(self.log_range.shape, np.nan))
        self.known = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """The loaded range may be one that has seen no data."""
        super()._load_from_state_dict(*args, **kwargs)
        self.known = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.known and not self.seen():
            if not self.training:
                return x
            with torch.no_grad():
                self.log_range.fill_(float(x.abs().max().clamp_min(1e-6).log()) + 1e-6)
        self.known = True
        return super().forward(x)

    def seen(self) -> bool:
        """Whether the range is known."""
        return bool(self.log_range.isfinite().all())


class FakeQuantizer(Transform):
    """A tensor at a fixed precision, with a range that is no longer trained."""

    log_range: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("log_range", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        beta = self.log_range.exp()
        x = clip(x, beta)
        return x if self.bits == WIDTHS[-1] else quantize(x, beta, self.bits)


class IntCodes(Transform):
    """Integer codes and their step: a tensor at a fixed, low precision, for use instead of training."""

    step: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("step", torch.ones(1))

    def forward(self, codes: Tensor) -> Tensor:
        return codes.to(self.step.dtype) * self.step

    @torch.no_grad()
    def encode(self, ladder: LearnedQuantizer, x: Tensor) -> Tensor:
        """Copy the quantizer's step size; return codes q with forward(q) == ladder(x)."""
        beta = ladder.log_range.exp()
        self.step.copy_(2 * beta / (2.0**self.bits - 1))
        return (clip(x, beta) * ((2.0**self.bits - 1) / (2 * beta))).round()
