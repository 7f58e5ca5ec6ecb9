"""Factors that start at values taken from the base weight, where their update is zero.

With B₀ and A₀ the initial values, the update is ΔW = B A − B₀ A₀: the base weight stays as it is, and the initial
update is zero. It is computed as

    ΔW = [B − B₀, B₀] · [A ; A − A₀]

which is the same matrix, exactly zero at the start, and free of the cancellation between two large products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from graphpeft.chain.factor import Scatter, widen
from graphpeft.chain.factors import Weighted
from graphpeft.chain.inits import kaiming


class DeltaFromInit(Weighted):
    """One side of that product: `left` is [B − B₀, B₀] of a B `(n, r)`, `right` is [A ; A − A₀] of an A `(r, n)`.

    `weight` is trained; `start`, its initial value, is stored in the adapter's file. Until values are assigned (see
    `Chain.with_init_from`), which needs the base weight's values, both hold the same random numbers.
    """

    start: Tensor

    def __init__(self, n: int, r: int, side: Literal["left", "right"]) -> None:
        shape = (n, r) if side == "left" else (r, n)
        outputs, inputs = (n, 2 * r) if side == "left" else (2 * r, n)
        super().__init__(outputs, inputs, shape, kaiming(), frozen=False, shared=None)
        self.side = side
        self.register_buffer("start", torch.empty(shape))

    def reset(self, rng: Callable[[str], np.random.RandomState]) -> None:
        super().reset(rng)
        self.assign(self.weight.detach())

    @torch.no_grad()
    def assign(self, value: Tensor) -> None:
        self.start.copy_(value)
        self.weight.copy_(self.start)

    def _whole(self) -> Tensor:
        value = self.value
        moved = value - self.start
        return torch.cat([moved, self.start], -1) if self.side == "left" else torch.cat([value, moved], -2)

    @property
    def is_matmul(self) -> bool:
        return True

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._whole())

    def accumulate(self, y: Tensor, x: Tensor, alpha: float, scatter: Scatter | None = None) -> Tensor:
        whole = self._whole() if scatter is None else scatter.expand(self._whole(), -2)
        rows = y.reshape(-1, self.outputs if scatter is None else scatter.outputs)
        return torch.addmm(rows, x, whole.t(), alpha=alpha).view_as(y)

    def matrix(self) -> Tensor:
        return widen(self._whole())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.side}"
