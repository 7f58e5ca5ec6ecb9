"""Updates that depend on the base weight: what DoRA makes of a weight and its low-rank change."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from graphpeft.chain.factors import Diag
from graphpeft.chain.inits import constant
from graphpeft.chain.transform import Transform


class Reweight(nn.Module):
    """From a weight W `(outputs, inputs)` and the product of a chain's factors Δ, the whole update ΔW.

    Sites with such an update take the weight form: W + ΔW is made once per forward pass.
    """

    def forward(self, weight: Tensor, delta: Tensor) -> Tensor:
        raise NotImplementedError

    def reset(self, weight: Tensor | None) -> None:
        """Fill its tensors; without a weight, as on the meta device, there is nothing to take values from."""


class Magnitude(Reweight):
    """W + ΔW = diag(m / ‖W + Δ‖) · (W + Δ), the norms being those of rows, one for each output feature.

    m is trained and starts at the norms of W. The norms count as constants in the gradient, which the paper finds to
    cost nothing (Liu et al., 2024, §4.3).
    """

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.magnitude = Diag(outputs, constant(1.0))

    @torch.no_grad()
    def reset(self, weight: Tensor | None) -> None:
        if weight is not None and not weight.is_meta:
            self.magnitude.weight.copy_(_norms(weight))

    def forward(self, weight: Tensor, delta: Tensor) -> Tensor:
        whole = weight + delta
        scale = self.magnitude.value / _norms(whole.detach()).clamp_min(torch.finfo(whole.dtype).tiny)
        # Written so that the start is exactly zero: scale is 1 there.
        return delta + (scale - 1).unsqueeze(-1) * whole


class RoundedBase(Reweight):
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
