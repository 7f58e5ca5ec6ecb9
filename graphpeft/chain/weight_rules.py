"""Updates that depend on the base weight, such as DoRA's."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from graphpeft.chain.factors import Diag
from graphpeft.chain.inits import constant
from graphpeft.chain.transform import Transform


class WeightRule(nn.Module):
    """Computes the whole update ΔW from a weight W `(outputs, inputs)` and the product Δ of a chain's factors.

    A site with such an update takes the weight form, where W + ΔW is formed once per forward pass. A rule with
    `has_side_path` instead scales output features by `row_scale`, beside the projection, and no adapted weight is
    formed.
    """

    has_side_path = False

    def row_scale(self, pair: tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
        """The factor on each row of W + Δ, one number for each output feature; Δ = B A is given as `(A, B)`."""
        raise NotImplementedError

    def forward(self, weight: Tensor, delta: Tensor) -> Tensor:
        raise NotImplementedError

    def reset(self, weight: Tensor | None) -> None:
        """Fill the rule's tensors from the weight; without a weight, as on the meta device, nothing is filled."""


class Magnitude(WeightRule):
    """W + ΔW = diag(m / ‖W + Δ‖) · (W + Δ), with one norm for each row, that is for each output feature.

    m is trained and starts at the norms of W. The gradient treats the norms as constants, which costs nothing according
    to the paper (Liu et al., 2024, §4.3).
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
        # In this form the initial update is exactly zero, because the initial gain is 1.
        return delta + (gain - 1).unsqueeze(-1) * whole

    def row_scale(self, pair: tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
        with (
            torch.no_grad()
        ):  # ‖W + B A‖² = ‖W‖² + 2 ⟨W Aᵀ, B⟩ + ⟨B A Aᵀ, B⟩, row by row, without a matrix as large as W
            a, b = pair
            base, more = _norms(weight), ((2 * (weight @ a.t()) + b @ (a @ a.t())) * b).sum(-1)
            # The root of a square may differ in the last bit, but the initial gain must be exactly 1.
            norms = torch.where(more == 0, base, (base.square() + more).clamp_min(0).sqrt())
        return self._row_scale(norms)

    def _row_scale(self, norms: Tensor) -> Tensor:
        value = self.magnitude.value
        return value / norms.clamp_min(torch.finfo(norms.dtype).tiny)


class QuantizedBase(WeightRule):
    """W + ΔW = Q(W) + Δ: the update uses the base weight at a lower precision; the weight itself does not change."""

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
