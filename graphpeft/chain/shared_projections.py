"""Frozen projections that all sites of a model share; each site uses as much of them as it needs."""

from __future__ import annotations

from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphpeft.chain.factor import Factor, widen


class SharedProjections(nn.Module):
    """A pair of random matrices, A `(r, inputs)` and B `(outputs, r)`, as wide as the widest site needs them.

    They depend on `key` alone and are uniform on ±√(6 / fan_in) (He et al., 2015). torch's own generator draws them, A
    first. PEFT draws VeRA's matrices in the same way, so an adapter with the same key and widths has the same update
    there.
    """

    A: Tensor
    B: Tensor

    def __init__(self, r: int, outputs: int, inputs: int, key: int) -> None:
        super().__init__()
        self.r, self.key, self.drawn = r, key, False
        self._size(outputs, inputs)

    def _size(self, outputs: int, inputs: int) -> None:
        self.outputs, self.inputs, self.drawn = outputs, inputs, False
        self.register_buffer("A", torch.empty(self.r, inputs), persistent=False)
        self.register_buffer("B", torch.empty(outputs, self.r), persistent=False)

    def cover(self, other: SharedProjections) -> None:
        """Grow to the widths of `other` where they are larger. Call this before `draw`."""
        outputs, inputs = max(self.outputs, other.outputs), max(self.inputs, other.inputs)
        if (outputs, inputs) != (self.outputs, self.inputs):
            with torch.device(self.A.device):
                dtype = self.A.dtype
                self._size(outputs, inputs)
                self.to(dtype)

    @torch.no_grad()
    def draw(self) -> None:
        """Fill both matrices, once."""
        if self.drawn:
            return
        generator = torch.Generator().manual_seed(self.key)
        for tensor in (self.A, self.B):
            bound = sqrt(6 / tensor.shape[1])
            drawn = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
            tensor.copy_(drawn.uniform_(-bound, bound, generator=generator))
        self.drawn = True


class Projection(Factor):
    """A site's part of the shared pair: the first `inputs` columns of A, or the first `outputs` rows of B."""

    def __init__(
        self,
        outputs: int,
        inputs: int,
        bank: SharedProjections,
        side: Literal["A", "B"],
        name: str,
        stored: bool = False,
    ) -> None:
        super().__init__(outputs, inputs, shared=name)
        self.bank = bank
        self.side = side
        self.stored = stored

    def joined(self, pool: dict[str, Any]) -> Factor:
        assert self.shared is not None
        bank = pool.setdefault(self.shared, self.bank)
        bank.cover(self.bank)
        self.bank = bank
        return self

    def reset(self, rng: Any) -> None:
        self.bank.draw()

    def saved(self) -> dict[str, Tensor]:
        return {self.side: getattr(self.bank, self.side)} if self.stored else {}

    def _part(self) -> Tensor:
        return self.bank.A[:, : self.inputs] if self.side == "A" else self.bank.B[: self.outputs]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._part())

    def matrix(self) -> Tensor:
        return widen(self._part())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.side}"
