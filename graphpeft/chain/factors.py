"""The trained factors: dense and diagonal matrices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphpeft.chain.chain import Factor, Scatter, widen
from graphpeft.chain.inits import Init


class _Weighted(Factor):
    """A factor with one tensor, `weight`: a parameter, or, frozen, a buffer that its seed regenerates."""

    weight: Tensor

    def __init__(
        self, outputs: int, inputs: int, shape: tuple[int, ...], init: Init, frozen: bool, shared: str | None
    ) -> None:
        super().__init__(outputs, inputs, shared)
        self.init = init
        self.frozen = frozen
        if frozen:
            self.register_buffer("weight", torch.empty(shape), persistent=False)
        else:
            self.weight = nn.Parameter(torch.empty(shape))

    def reset(self, rng: Callable[[str], np.random.RandomState]) -> None:
        self.init(self.weight, rng("weight"))

    def extra_repr(self) -> str:
        return super().extra_repr() + (", frozen=True" if self.frozen else "")


class Dense(_Weighted):
    """A dense matrix: `weight` is `(outputs, inputs)`."""

    def __init__(self, outputs: int, inputs: int, init: Init, frozen: bool = False, shared: str | None = None) -> None:
        super().__init__(outputs, inputs, (outputs, inputs), init, frozen, shared)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def accumulate(self, y: Tensor, x: Tensor, alpha: float, scatter: Scatter | None = None) -> Tensor:
        if self.frozen:  # FX would evaluate the transpose of a buffer while tracing
            return super().accumulate(y, x, alpha, scatter)
        weight = self.weight if scatter is None else scatter.expand(self.weight, -2)
        rows = y.reshape(-1, self.outputs if scatter is None else scatter.outputs)
        return torch.addmm(rows, x.reshape(-1, self.inputs), weight.t(), alpha=alpha).view_as(y)

    def matrix(self) -> Tensor:
        return widen(self.weight)


class Diag(_Weighted):
    """A diagonal matrix: `weight`, of `size` entries, multiplies the features."""

    def __init__(self, size: int, init: Init, frozen: bool = False, shared: str | None = None) -> None:
        super().__init__(size, size, (size,), init, frozen, shared)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight

    def accumulate(self, y: Tensor, x: Tensor, alpha: float, scatter: Scatter | None = None) -> Tensor:
        if scatter is not None:
            return super().accumulate(y, x, alpha, scatter)
        return torch.addcmul(y, x, self.weight, value=alpha)

    def matrix(self) -> Tensor:
        return torch.diag(widen(self.weight))

    def times(self, other: Tensor) -> Tensor:
        return widen(self.weight).unsqueeze(1) * other
