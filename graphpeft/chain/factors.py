"""The trained factors: dense and diagonal matrices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from graphpeft.chain.factor import Factor, Scatter, widen
from graphpeft.chain.inits import Init
from graphpeft.chain.quantizers import IntCodes
from graphpeft.chain.renamed import renamed
from graphpeft.chain.transform import Transform


class Weighted(Factor):
    """A factor with one tensor, `weight`: a parameter or, if frozen, a buffer that its seed regenerates."""

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
        for place, transform in enumerate(self.applied):
            transform.reset(self.weight, partial(_named, rng, f"transforms.{place}"))

    @property
    def value(self) -> Tensor:
        """`weight` after its transforms, applied in order: the tensor that the factor computes with."""
        return reduce(lambda tensor, transform: transform(tensor), self.applied, self.weight)

    def with_transforms(self, *transforms: Transform) -> Self:
        """This factor with additional transforms of its weight."""
        self.transforms = nn.ModuleList([*self.applied, *transforms])
        return self

    def as_codes(self, bits: int) -> Self:
        """This factor at a fixed precision: below 32 bits the weight is integer codes, stored but not trained."""
        if bits == 32:
            return self
        shape = self.weight.shape
        del self.weight
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8 if bits <= 8 else torch.int16))
        return self.with_transforms(IntCodes(bits))

    through = renamed("through", "with_transforms")
    coded = renamed("coded", "as_codes")

    @property
    def applied(self) -> list[Transform]:
        """The transforms of the weight, in the order in which they act."""
        return list(getattr(self, "transforms", ()))

    def extra_repr(self) -> str:
        return super().extra_repr() + (", frozen=True" if self.frozen else "")


def _named(rng: Callable[[str], np.random.RandomState], prefix: str, name: str) -> np.random.RandomState:
    return rng(f"{prefix}.{name}")


class Dense(Weighted):
    """A dense matrix: `weight` is `(outputs, inputs)`."""

    def __init__(self, outputs: int, inputs: int, init: Init, frozen: bool = False, shared: str | None = None) -> None:
        super().__init__(outputs, inputs, (outputs, inputs), init, frozen, shared)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.value)

    def accumulate(self, y: Tensor, x: Tensor, alpha: float, scatter: Scatter | None = None) -> Tensor:
        if self.frozen:  # FX would evaluate the transpose of a buffer while tracing
            return super().accumulate(y, x, alpha, scatter)
        weight = self.value if scatter is None else scatter.expand(self.value, -2)
        rows = y.reshape(-1, self.outputs if scatter is None else scatter.outputs)
        return torch.addmm(rows, x, weight.t(), alpha=alpha).view_as(y)

    @property
    def is_matmul(self) -> bool:
        return not self.frozen

    def matrix(self) -> Tensor:
        return widen(self.value)


class Diag(Weighted):
    """A diagonal matrix: `weight`, of `size` entries, multiplies the features."""

    def __init__(self, size: int, init: Init, frozen: bool = False, shared: str | None = None) -> None:
        super().__init__(size, size, (size,), init, frozen, shared)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.value

    def accumulate(self, y: Tensor, x: Tensor, alpha: float, scatter: Scatter | None = None) -> Tensor:
        if scatter is not None:
            return super().accumulate(y, x, alpha, scatter)
        return torch.addcmul(y, x, self.value, value=alpha)

    @property
    def macs(self) -> int:
        return self.outputs

    def matrix(self) -> Tensor:
        return torch.diag(widen(self.value))

    def times(self, other: Tensor) -> Tensor:
        return widen(self.value).unsqueeze(1) * other
