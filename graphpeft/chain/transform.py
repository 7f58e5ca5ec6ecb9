"""Functions applied to a factor's tensor before each use: noise, a quantizer, a gate. The tensor stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn


class Transform(nn.Module):
    """A function of a factor's `weight` that keeps its shape. It may differ between training and evaluation.

    In rewritten graphs it remains a module, as dropout does, so that `train()` and `eval()` switch it, and an export in
    evaluation mode contains nothing that only training needs.
    """

    stored: bool = True
    """Whether its tensors are stored in the adapter's file; training state is not."""

    def forward(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def reset(self, weight: Tensor, rng: Callable[[str], np.random.RandomState]) -> None:
        """Fill the transform's own tensors, after the factor has filled its `weight`."""

    def join(self, pool: dict[str, Any]) -> None:
        """Share common state with the adapter's other transforms through `pool`, during the insertion."""

    def penalty(self, weight: Tensor | None) -> Tensor | None:
        """The transform's term in the training loss, a scalar, or `None`. `weight` is `None` if the transform acts on
        no trained tensor. See `graphpeft.train.penalty`."""
        return None


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's tensors by name, without those of transforms that are not stored."""
    training = tuple(
        f"{n}." if n else "" for n, m in module.named_modules() if isinstance(m, Transform) and not m.stored
    )
    return {name: t for name, t in module.state_dict(keep_vars=True).items() if not name.startswith(training)}
