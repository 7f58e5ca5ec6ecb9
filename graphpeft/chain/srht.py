"""Fast frozen projections: the subsampled randomized Hadamard transform and its adjoint.

    SRHT         c · S · H · P · D        R^d to R^r: signs D, zero-padding P, Hadamard matrix H, r random rows S
    AdjointSRHT  c · D · Pᵀ · Hᵀ · Sᵀ     R^r to R^d

(Ailon & Chazelle, 2006; Tropp, 2011; Lei & Lan, 2020.) All tensors come from a seed; none is stored.

The order of H is a · b, and H = H_a ⊗ H_b is never formed. With the features of x laid out as an a × b matrix X, two
small matrix products apply it, H x = vec(H_a X H_bᵀ), which costs a + b multiplications per feature instead of a · b.

`uniform` samples any r rows of H. `grid` samples some rows of H_a and some of H_b and takes all their products, so that
S = S_a ⊗ S_b. A grid needs only the thin matrices S_a H_a and S_b H_b, which makes the transform several times cheaper.
If a grid has more than r points, the first r are used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from graphpeft.chain.factor import Factor, widen
from graphpeft.chain.hadamard import hadamard_factors, hadamard_matrix
from graphpeft.chain.inits import fill
from graphpeft.errors import AdapterError

Choice = Literal["grid", "uniform"]


class _Transform(Factor):
    """The common part of both directions, in terms of the `wide` side (d) and the `narrow` side (r)."""

    adjoint: ClassVar[bool]
    signs: Tensor
    rows: Tensor
    """For `uniform`, the rows of H; for a grid, the rows of H_a and then those of H_b."""
    left: Tensor
    right: Tensor

    def __init__(
        self, outputs: int, inputs: int, wide: int, narrow: int, scale: float, shared: str | None, rows: Choice
    ) -> None:
        super().__init__(outputs, inputs, shared)
        self.split = a, b = hadamard_factors(wide)
        self.order = a * b
        self.padding = self.order - wide
        self.narrow = narrow
        self.scale = scale
        if narrow > self.order:
            raise AdapterError(
                f"{self}: a Hadamard transform of order {self.order} has no {narrow} distinct rows. "
                f"Choose a rank of at most {self.order}."
            )
        self.grid = _grid(a, b, narrow) if rows == "grid" else None
        kept = self.grid or self.split
        self.register_buffer("signs", torch.empty(wide), persistent=False)
        self.register_buffer(
            "rows", torch.empty(sum(kept) if self.grid else narrow, dtype=torch.int64), persistent=False
        )
        # Store a factor that is used transposed as its transpose: FX would evaluate `buffer.t()` while tracing.
        left, right = (kept[0], a), (kept[1], b)
        self.register_buffer("left", torch.empty(left[::-1] if self.adjoint else left), persistent=False)
        self.register_buffer("right", torch.empty(right if self.adjoint else right[::-1]), persistent=False)

    @property
    def macs(self) -> int:
        # Two thin products, the one with `right` first.
        (a, b), (left, right) = self.split, self.grid or self.split
        return left * b * (right + a) if self.adjoint else a * right * (b + left)

    def reset(self, rng: Callable[[str], np.random.RandomState]) -> None:
        a, b = self.split
        fill(self.signs, np.where(rng("signs").uniform(size=self.signs.shape) < 0.5, -1, 1))
        left, right = hadamard_matrix(a), hadamard_matrix(b)
        if self.grid:
            here, there = rng("rows.left").permutation(a)[: self.grid[0]], rng("rows").permutation(b)[: self.grid[1]]
            fill(self.rows, np.concatenate([here, there]))
            left, right = left[here], right[there]
        else:
            fill(self.rows, rng("rows").permutation(self.order)[: self.narrow])
        fill(self.left, left.T if self.adjoint else left)
        fill(self.right, self.scale * (right if self.adjoint else right.T))

    def _transform(self, x: Tensor) -> Tensor:
        """Apply the Kronecker product to the last axis. `right` has the scale, which keeps half-precision sums
        small."""
        before = self.grid if self.adjoint and self.grid else self.split
        return torch.matmul(self.left, torch.matmul(x.unflatten(-1, before), self.right)).flatten(-2)

    def _sampled(self) -> Tensor:
        """The sampled rows of H · P · D, `(narrow, wide)`, with the scale, without forming H.

        Row i of H_a ⊗ H_b is the Kronecker product of row i // b of H_a and row i % b of H_b.
        """
        places = torch.arange(self.narrow, device=self.rows.device) if self.grid else self.rows
        left, right = (self.left.t(), self.right) if self.adjoint else (self.left, self.right.t())
        a, b = places // len(right), places % len(right)
        rows = (widen(left)[a].unsqueeze(2) * widen(right)[b].unsqueeze(1)).flatten(1)
        return rows[:, : len(self.signs)] * widen(self.signs)


def _grid(a: int, b: int, r: int) -> tuple[int, int]:
    """How many rows of each factor make the smallest grid of at least r points, as equal as possible."""
    splits = [(-(-r // right), right) for right in range(1, b + 1) if -(-r // right) <= a]
    return min(splits, key=lambda split: (split[0] * split[1], abs(split[0] - split[1])))


class SRHT(_Transform):
    """A random projection of `inputs` features onto `outputs` orthogonal directions whose entries are ±`scale`."""

    adjoint = False

    def __init__(
        self, outputs: int, inputs: int, scale: float, shared: str | None = None, rows: Choice = "uniform"
    ) -> None:
        super().__init__(outputs, inputs, wide=inputs, narrow=outputs, scale=scale, shared=shared, rows=rows)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.signs
        x = self._transform(F.pad(x, (0, self.padding)) if self.padding else x)
        if not self.grid:
            return x.index_select(-1, self.rows)
        return x if self.grid[0] * self.grid[1] == self.narrow else x.narrow(-1, 0, self.narrow)

    def matrix(self) -> Tensor:
        return self._sampled()


class AdjointSRHT(_Transform):
    """A random frame: `inputs` coefficients of orthogonal directions in R^`outputs` whose entries are ±`scale`."""

    adjoint = True
    slots: Tensor

    def __init__(
        self, outputs: int, inputs: int, scale: float, shared: str | None = None, rows: Choice = "uniform"
    ) -> None:
        super().__init__(outputs, inputs, wide=outputs, narrow=inputs, scale=scale, shared=shared, rows=rows)
        if not self.grid:
            self.register_buffer("slots", torch.empty(self.order, dtype=torch.int64), persistent=False)

    def reset(self, rng: Callable[[str], np.random.RandomState]) -> None:
        super().reset(rng)
        if not self.grid:
            # Sᵀ as a gather: a row that was not sampled reads the zero appended after the coefficients.
            slots = np.full(self.order, self.inputs)
            slots[self.rows.cpu().numpy()] = np.arange(self.inputs)
            fill(self.slots, slots)

    def forward(self, x: Tensor) -> Tensor:
        if self.grid:
            surplus = self.grid[0] * self.grid[1] - self.narrow
            x = F.pad(x, (0, surplus)) if surplus else x
        else:
            x = F.pad(x, (0, 1)).index_select(-1, self.slots)
        x = self._transform(x)
        x = x.narrow(-1, 0, self.outputs) if self.padding else x
        return x * self.signs

    def matrix(self) -> Tensor:
        return self._sampled().t()
