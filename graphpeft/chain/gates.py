"""Stochastic gates that learn to be open or closed: the hard concrete distribution (Louizos et al., 2018, arXiv:1712.01312).

In training a gate is a random number in [0, 1] that is often exactly 0 or 1 and propagates a gradient to its logit. In
evaluation it is 0 or 1, decided by the logit alone.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log

import numpy as np
import torch
from torch import Tensor, nn

from graphpeft.chain.inits import fill
from graphpeft.chain.transform import Transform

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
"""Temperature of the concrete distribution, and the interval to which it is stretched before clipping to [0, 1]."""
CLOSED = 0.34
"""A gate is closed in evaluation if it is 0 with at least this probability in training (Bayesian Bits)."""
_SHIFT = TEMPERATURE * log(-LOW / HIGH)
_THRESHOLD = _SHIFT - log(CLOSED / (1 - CLOSED))


def sample(logits: Tensor) -> Tensor:
    """One random gate for each logit, differentiable."""
    noise = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6).logit()
    return (((noise + logits) / TEMPERATURE).sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


def probability(logits: Tensor) -> Tensor:
    """The probability that each gate is not 0 in training, differentiable."""
    return (logits - _SHIFT).sigmoid()


def decided(logits: Tensor) -> Tensor:
    """Which gates are open in evaluation, as 0 and 1: those with a logit above -0.935."""
    return (logits > _THRESHOLD).to(logits.dtype)


class RankGate(Transform):
    """Keep the first k of the r entries of a diagonal, with a learned k: an entry counts only if all before it do.

    The first entry has no gate unless `drop` is set, which allows the whole update to vanish. In training each gate is
    rounded to 0 or 1 with a straight-through gradient. The penalty is `weight` times the mean probability that a gate
    is open; with `nested`, the probability that it is open together with all before it, as in the forward pass.
    """

    def __init__(self, r: int, weight: float, logit: float = 6.0, nested: bool = False, drop: bool = False) -> None:
        super().__init__()
        self.weight, self.logit, self.nested = weight, logit, nested
        self.free = 0 if drop else 1
        self.logits = nn.Parameter(torch.empty(r - self.free))

    def reset(self, weight: Tensor, rng: Callable[[str], np.random.RandomState]) -> None:
        fill(self.logits, np.full(self.logits.shape, self.logit))

    def forward(self, diagonal: Tensor) -> Tensor:
        gates = sample(self.logits) if self.training else decided(self.logits)
        gates = gates + (gates.round() - gates).detach()
        return diagonal * with_ones(gates, self.free).cumprod(-1)

    def kept(self) -> int:
        """The number of entries kept in evaluation; for a stack, the largest number over its matrices."""
        return int(with_ones(decided(self.logits), self.free).cumprod(-1).sum(-1).max())

    def penalty(self, diagonal: Tensor | None) -> Tensor | None:
        if not self.weight or not self.logits.numel():
            return None
        open_ = probability(self.logits)
        return self.weight * (open_.cumprod(-1) if self.nested else open_).mean(-1).sum()


def with_ones(gates: Tensor, n: int) -> Tensor:
    """`gates` with `n` open gates in front, on the last axis."""
    return torch.cat([gates.new_ones(*gates.shape[:-1], n), gates], -1)
