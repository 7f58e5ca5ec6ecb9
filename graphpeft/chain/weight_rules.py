"""Updates that depend on the base weight: what DoRA makes of a weight and its low-rank change."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from graphpeft.chain.factors import Diag
from graphpeft.chain.inits import constant
from graphpeft.chain.transform import Transform


class WeightRule(nn.Module):
    """From a weight W `(outputs, inputs)` and the product of a chain's factors Δ, the whole update ΔW.

    A site with such an update takes the weight form, where W + ΔW is made once per forward pass, unless `has_side_path` is set:
    then it multiplies rows by a `row_scale`, which can be done beside the projection.
    """

    has_side_path = False

    def row_scale(self, pair: tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
        """What W + Δ is multiplied by, one number for each output feature; Δ = B A is given as `(A, B)`."""
        raise NotImplementedError

    def forward(self, weight: Tensor, delta: Tensor) -> Tensor:
        raise NotImplementedError

    def reset(self, weight: Tensor | None) -> None:
        """Fill its tensors; without a weight, as on the meta device, there is nothing to take values from."""


class Magnitude(WeightRule):
    """W + ΔW = diag(m / ‖W + Δ‖) · (W + Δ), the norms being those of rows, one for each output feature.

    m is trained and starts at the norms of W. The norms count as constants in the gradient, which the paper finds to
    cost nothing (Liu et al., 2024, §4.3).
    """

    has_side_path = True

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.magnitude = Diag(outputs, constant(1.0))

    @torch.no_grad()
    def reset(self, weight: Tensor | None) -> None:
        if weight is not None and not weight.is_meta:
            self.magnitude.weight.copy_(_norms(weight))

    def forward(self, weight: Tensor, delta: Tensor) -> Tensor:
        whole = weight + delta
        gain = self._row_scale(_norms(whole.detach()))
        # Written so that the start is exactly zero: the gain is 1 there.
        return delta + (gain - 1).unsqueeze(-1) * whole

    def row_scale(self, pair: tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
        with (
            torch.no_grad()
        ):  # ‖W + B A‖² = ‖W‖² + 2 ⟨W Aᵀ, B⟩ + ⟨B A Aᵀ, B⟩, row by row, without a matrix as large as W
            a, b = pair
            base, more = _norms(weight), ((2 * (weight @ a.t()) + b @ (a @ a.t())) * b).sum(-1)
            # A square root need not give back to the bit what was squared, and at the start the gain is 1.
            norms = torch.where(more == 0, base, (base.square() + more).clamp_min(0).sqrt())
        return self._row_scale(norms)

    def _row_scale(self, norms: Tensor) -> Tensor:
        value = self.magnitude.value
        return value / norms.clamp_min(torch.finfo(norms.dtype).tiny)


class QuantizedBase(WeightRule):
    """W + ΔW = Q(W) + Δ: the base weight at a lower precision, which leaves the weight itself alone."""

    def __init__(self, rounding: Transform) -> None:
        super().__init__()
        self.rounding = rounding

    def reset(self, weight: Tensor | None) -> None:
        if weight is not None and not weight.is_meta:
            self.rounding.reset(weight, lambda name: np.random.RandomState(0))

    def forward(self, weight: Tensor, delta: Tensor) -> Tensor:
        return (self.rounding(weight) - weight) + delta


def _norms(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=-1)
