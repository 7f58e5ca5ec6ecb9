"""Fast frozen projections: the subsampled randomized Hadamard transform and its adjoint.

    SRHT         c · S · H · P · D        R^d to R^r: signs D, zero-padding P, Hadamard matrix H, r random rows S
    AdjointSRHT  c · D · Pᵀ · Hᵀ · Sᵀ     R^r to R^d

(Ailon & Chazelle, 2006; Tropp, 2011; Lei & Lan, 2020.) H = H_a ⊗ H_b is applied as two small matrix products,
H x = vec(H_a X H_bᵀ), which costs a + b multiplications per feature instead of a · b. All tensors come from a
seed; none is stored.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from graphpeft.chain.chain import Factor, widen
from graphpeft.chain.hadamard import hadamard_factors, hadamard_matrix
from graphpeft.chain.inits import fill
from graphpeft.errors import AdapterError


class _Transform(Factor):
    """What both directions share, in terms of the `wide` side (d) and the `narrow` one (r)."""

    signs: Tensor
    rows: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, outputs: int, inputs: int, wide: int, narrow: int, scale: float, shared: str | None) -> None:
        super().__init__(outputs, inputs, shared)
        self.split = a, b = hadamard_factors(wide)
        self.order = a * b
        self.padding = self.order - wide
        self.scale = scale
        if narrow > self.order:
            raise AdapterError(
                f"{self}: a Hadamard transform of order {self.order} has no {narrow} distinct rows. "
                f"Choose a rank of at most {self.order}."
            )
        self.register_buffer("signs", torch.empty(wide), persistent=False)
        self.register_buffer("rows", torch.empty(narrow, dtype=torch.int64), persistent=False)
        self.register_buffer("left", torch.empty(a, a), persistent=False)
        self.register_buffer("right", torch.empty(b, b), persistent=False)

    def reset(self, rng: Callable[[str], np.random.RandomState]) -> None:
        fill(self.signs, np.where(rng("signs").uniform(size=self.signs.shape) < 0.5, -1, 1))
        fill(self.rows, rng("rows").permutation(self.order)[: len(self.rows)])

    def _transform(self, x: Tensor) -> Tensor:
        # The scale is part of `right`, which comes first: in half precision sums stay small.
        return torch.matmul(self.left, torch.matmul(x.unflatten(-1, self.split), self.right)).flatten(-2)

    def _sampled(self, left: Tensor, right: Tensor) -> Tensor:
        """The sampled rows of (left ⊗ right) · P · D, `(narrow, wide)`, without forming the product."""
        a, b = self.rows // self.split[1], self.rows % self.split[1]
        rows = (widen(left)[a].unsqueeze(2) * widen(right)[b].unsqueeze(1)).flatten(1)
        return rows[:, : len(self.signs)] * widen(self.signs)


class SRHT(_Transform):
    """A random sketch of `inputs` features by `outputs` orthogonal directions whose entries are ±`scale`."""

    def __init__(self, outputs: int, inputs: int, scale: float, shared: str | None = None) -> None:
        super().__init__(outputs, inputs, wide=inputs, narrow=outputs, scale=scale, shared=shared)

    def reset(self, rng: Callable[[str], np.random.RandomState]) -> None:
        super().reset(rng)
        fill(self.left, hadamard_matrix(self.split[0]))
        fill(self.right, self.scale * hadamard_matrix(self.split[1]).T)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.signs
        x = F.pad(x, (0, self.padding)) if self.padding else x
        return self._transform(x).index_select(-1, self.rows)

    def matrix(self) -> Tensor:
        return self._sampled(self.left, self.right.t())


class AdjointSRHT(_Transform):
    """A random frame: `inputs` coefficients of orthogonal directions in R^`outputs` whose entries are ±`scale`."""

    slots: Tensor

    def __init__(self, outputs: int, inputs: int, scale: float, shared: str | None = None) -> None:
        super().__init__(outputs, inputs, wide=outputs, narrow=inputs, scale=scale, shared=shared)
        self.register_buffer("slots", torch.empty(self.order, dtype=torch.int64), persistent=False)

    def reset(self, rng: Callable[[str], np.random.RandomState]) -> None:
        super().reset(rng)
        fill(self.left, hadamard_matrix(self.split[0]).T)
        fill(self.right, self.scale * hadamard_matrix(self.split[1]))
        # Sᵀ as a gather: a row that was not sampled reads the zero appended after the coefficients.
        slots = np.full(self.order, self.inputs)
        slots[self.rows.cpu().numpy()] = np.arange(self.inputs)
        fill(self.slots, slots)

    def forward(self, x: Tensor) -> Tensor:
        x = self._transform(F.pad(x, (0, 1)).index_select(-1, self.slots))
        x = x.narrow(-1, 0, self.outputs) if self.padding else x
        return x * self.signs

    def matrix(self) -> Tensor:
        return self._sampled(self.left.t(), self.right).t()
