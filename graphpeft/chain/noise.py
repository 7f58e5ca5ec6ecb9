"""Gaussian noise on a trained tensor, with a learned standard deviation: the posterior of a PAC-Bayes bound."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor, nn

from graphpeft.chain.transform import Transform
from graphpeft.errors import RuleError


class Noise(Transform):
    """`weight + exp(log_sigma) · draw` in training, the weight itself in evaluation.

    `draw` stays the same until `redraw`, so that all uses of the weight in one forward pass, and a recomputed pass, see
    the same noise. The prior is N(start, λ²), where `start` is the weight given here. There is one λ for the whole
    tensor, or one for each matrix of a `stacked` tensor; with `trained_prior`, log λ is a parameter, `log_prior`.
    Raises `RuleError` unless sigma > 0.
    """

    stored = False
    start: Tensor
    draw: Tensor
    log_prior: nn.Parameter | None

    def __init__(
        self, weight: Tensor, sigma: float = 0.03, *, trained_prior: bool = False, stacked: bool = False
    ) -> None:
        super().__init__()
        if not sigma > 0:
            raise RuleError(f"Noise: sigma = {sigma} is not > 0. Leave the noise out instead of giving it no size.")
        start = weight.detach()
        self.axes = tuple(range(1 if stacked else 0, start.dim()))
        self.log_sigma = nn.Parameter(torch.full_like(start, log(sigma)))
        # As long as the weight has not moved and all σ are equal, the best λ is that σ.
        best = self.log_sigma.detach().mean(self.axes, keepdim=True)
        self.log_prior = nn.Parameter(best) if trained_prior else None
        self.register_buffer("start", start.clone())
        self.register_buffer("draw", torch.zeros_like(start), persistent=False)

    def redraw(self, seed: int | None = None) -> None:
        """Draw new noise for the next forward pass; a seed makes it reproducible on the same kind of device."""
        if seed is None:
            self.draw = torch.randn_like(self.draw)
        else:
            generator = torch.Generator(self.draw.device).manual_seed(seed)
            self.draw = torch.empty_like(self.draw).normal_(generator=generator)

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training:
            return weight
        logs: Tensor = self.log_sigma
        if self.log_prior is not None:
            # This adds zero: DistributedDataParallel needs every parameter to take part in the forward pass.
            logs = logs + 0 * self.log_prior
        return weight + logs.exp() * self.draw

    def kl(self, weight: Tensor) -> Tensor:
        """KL(N(weight, σ²) ‖ N(start, λ²)), a scalar, in float32 or better.

        That is ½ Σ [(σ² + (weight − start)²) / λ² − 1 + ln λ² − ln σ²]. A λ that is not trained has the value that
        minimizes this, λ² = (Σσ² + ‖weight − start‖²) / d for d entries.
        """
        wide = torch.promote_types(weight.dtype, torch.float32)
        logs = self.log_sigma.to(wide)
        square = (2 * logs).exp() + (weight - self.start).to(wide).square()
        prior = square.mean(self.axes, keepdim=True).log() / 2 if self.log_prior is None else self.log_prior.to(wide)
        return (square * (-2 * prior).exp() - 1).sum() / 2 + (prior - logs).sum()
