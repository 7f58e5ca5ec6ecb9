"""Gaussian noise on a trained tensor, with a learned standard deviation: the posterior of a PAC-Bayes bound."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor, nn

from graphpeft.chain.transform import Transform
from graphpeft.errors import RuleError


class Noise(Transform):
    """`weight + exp(log_sigma) · draw` in training, the weight itself in evaluation.

    `draw` stays the same until `redraw`, so that all uses of the weight in one forward pass, and a recomputed one,
    see the same noise. The prior is centered on `start`, the weight given here. Raises `RuleError` unless sigma > 0.
    """

    stored = False
    start: Tensor
    draw: Tensor

    def __init__(self, weight: Tensor, sigma: float = 0.03) -> None:
        super().__init__()
        if not sigma > 0:
            raise RuleError(f"Noise: sigma = {sigma} is not > 0. Leave the noise out instead of giving it no size.")
        start = weight.detach()
        self.log_sigma = nn.Parameter(torch.full_like(start, log(sigma)))
        self.register_buffer("start", start.clone())
        self.register_buffer("draw", torch.zeros_like(start), persistent=False)

    def redraw(self) -> None:
        """Draw new noise for the next forward pass."""
        self.draw = torch.randn_like(self.draw)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.log_sigma.exp() * self.draw if self.training else weight

    def kl(self, weight: Tensor) -> Tensor:
        """KL(N(weight, σ²) ‖ N(start, λ²)), a scalar, at the λ² = (Σσ² + ‖weight − start‖²) / d that minimizes it."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        logs = self.log_sigma.to(wide)
        spread = ((2 * logs).exp() + (weight - self.start).to(wide).square()).mean()
        return 0.5 * weight.numel() * spread.log() - logs.sum()
