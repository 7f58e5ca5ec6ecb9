"""Block-diagonal factors: n small dense matrices side by side, each on its own chunk of the features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphpeft.chain.factor import Factor, widen
from graphpeft.chain.factors import Dense, Weighted
from graphpeft.chain.inits import Init


class BlockDiag(Weighted):
    """diag(W₁ … Wₙ) of equal blocks: `weight` is `(n, outputs / n, inputs / n)`.

    The n blocks are one batched product. Both widths must be multiples of n.
    """

    def __init__(self, n: int, outputs: int, inputs: int, init: Init) -> None:
        super().__init__(outputs, inputs, (n, outputs // n, inputs // n), init, frozen=False, shared=None)
        self.n = n

    @property
    def macs(self) -> int:
        return self.weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        # einsum puts the blocks first in the batch, which is several times faster than tokens first.
        chunks = x.unflatten(-1, (self.n, self.inputs // self.n))
        return torch.einsum("...ni,noi->...no", chunks, self.value).flatten(-2)

    def matrix(self) -> Tensor:
        return torch.block_diag(*widen(self.value).unbind())

    def times(self, other: Tensor) -> Tensor:
        chunks = other.reshape(self.n, self.inputs // self.n, -1)
        return torch.matmul(self.value.to(chunks.dtype), chunks).reshape(self.outputs, -1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, n={self.n}"


class MixedBlocks(Factor):
    """diag(s₁ W₁ … sₙ Wₙ) of blocks with unequal `shapes` (outputs, inputs), made dense at each use."""

    def __init__(self, shapes: Sequence[tuple[int, int]], init: Init, scales: Sequence[float] | None = None) -> None:
        outputs, inputs = (sum(sizes) for sizes in zip(*shapes, strict=True))
        super().__init__(outputs, inputs)
        self.scales = tuple(scales) if scales is not None else (1.0,) * len(shapes)
        self.parts = nn.ModuleList(Dense(*shape, init) for shape in shapes)

    @property
    def blocks(self) -> list[Tensor]:
        """The trained matrices W₁ … Wₙ, without scales and transforms."""
        return [part.weight for part in self._parts]

    @property
    def _parts(self) -> list[Dense]:
        return list(self.parts)  # type: ignore[arg-type]

    def reset(self, rng: Callable[[str], np.random.RandomState]) -> None:
        for place, part in enumerate(self._parts):
            part.reset(partial(_of_block, rng, place))

    def _whole(self) -> Tensor:
        scaled = zip((part.value for part in self._parts), self.scales, strict=True)
        return torch.block_diag(*(value if scale == 1 else value * scale for value, scale in scaled))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._whole())

    def matrix(self) -> Tensor:
        return widen(self._whole())


def _of_block(rng: Callable[[str], np.random.RandomState], place: int, name: str) -> np.random.RandomState:
    return rng(f"blocks.{place}.{name}")
