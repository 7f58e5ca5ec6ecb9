"""Block-diagonal factors: n small dense matrices side by side, each on its own chunk of the features."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphpeft.chain.factor import Factor, widen
from graphpeft.chain.factors import Weighted
from graphpeft.chain.inits import Init


class BlockDiag(Weighted):
    """diag(W₁ … Wₙ) of equal blocks: `weight` is `(n, outputs / n, inputs / n)`.

    The n blocks are one batched product. Both widths have to be multiples of n.
    """

    def __init__(self, n: int, outputs: int, inputs: int, init: Init) -> None:
        super().__init__(outputs, inputs, (n, outputs // n, inputs // n), init, frozen=False, shared=None)
        self.n = n

    @property
    def macs(self) -> int:
        return self.weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        # einsum makes one batched product with the blocks first, several times faster than one over tokens first.
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
    """diag(s₁ W₁ … sₙ Wₙ) of blocks of unequal `shapes` (outputs, inputs), laid out densely when used."""

    def __init__(self, shapes: Sequence[tuple[int, int]], init: Init, scales: Sequence[float] | None = None) -> None:
        outputs, inputs = (sum(sizes) for sizes in zip(*shapes, strict=True))
        super().__init__(outputs, inputs)
        self.init = init
        self.scales = tuple(scales) if scales is not None else (1.0,) * len(shapes)
        self.blocks = nn.ParameterList(torch.empty(shape) for shape in shapes)

    def reset(self, rng: Callable[[str], np.random.RandomState]) -> None:
        for place, block in enumerate(self.blocks):
            self.init(block, rng(f"blocks.{place}"))

    def _whole(self) -> Tensor:
        scaled = zip(self.blocks, self.scales, strict=True)
        return torch.block_diag(*(block if scale == 1 else block * scale for block, scale in scaled))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._whole())

    def matrix(self) -> Tensor:
        return widen(self._whole())
