"""Estimate the constant K of the PAC-Bayes bound from losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log

import torch
from torch import Tensor, nn

from graphpeft.chain import Noise
from graphpeft.errors import RuleError

GAMMAS = tuple(10 ** (power / 10) for power in range(-10, 11))
"""From 0.1 to 10, the range where the bound is informative."""


def estimate_K(losses: Tensor, gammas: Sequence[float] = GAMMAS) -> float:
    """The smallest K with mean(exp(γ (μ − ℓ))) ≤ exp(3/2 K² γ²) for every γ of `gammas` (PAC-tuning: arXiv:2310.17588).

    `losses` is `(..., examples)`, a row of finite losses for each perturbed network. μ is the mean of a row; the other mean
    is over all losses. Include the γ used in training. This is an estimate: unseen examples may deviate more. Raises
    `RuleError` for no losses, losses that are not finite, or γ that are not > 0.
    """
    if not losses.numel() or not losses.isfinite().all() or not gammas or min(gammas) <= 0:
        raise RuleError("estimate_K: it needs at least one loss, all of them finite, and gammas > 0.")
    below = (losses.mean(-1, keepdim=True) - losses).flatten().double()
    moments = [(gamma, float((gamma * below).logsumexp(0)) - log(below.numel())) for gamma in gammas]
    # By Jensen's inequality no moment is below 1, except by rounding.
    return max((2 / 3 * max(moment, 0.0)) ** 0.5 / gamma for gamma, moment in moments)


@torch.no_grad()
def perturbed_losses(model: nn.Module, compute: Callable[[], Tensor], draws: int = 10) -> Tensor:
    """The results of `compute()`, which returns the loss of each example, for `draws` noise draws: `(draws, examples)`.

    The rest of the model is in evaluation mode; all modes are restored. Right after `PAC.attach` the draws come from the
    prior. Raises `RuleError` for a model without noise.
    """
    noises = [m for m in model.modules() if isinstance(m, Noise)]
    if not noises:
        raise RuleError("perturbed_losses: the model has no noise. Call gp.PAC(...).attach(model) first.")
    training, modes = model.training, [(m, m.training) for m in model.modules()]
    model.eval()  # the root's hook redraws only in training mode
    try:
        found = []
        for noise in noises:
            noise.train()
        for _ in range(draws):
            for noise in noises:
                noise.redraw()
            found.append(compute())
        return torch.stack(found)
    finally:
        model.train(training)  # an adapted GraphModule also switches its graph
        for module, mode in modes:
            module.training = mode
