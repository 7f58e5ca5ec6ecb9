"""What happens to a factor's tensor before it is used: noise, a quantizer, a gate. Nothing of it changes the factor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn


class Transform(nn.Module):
    """A function of a factor's `weight`, of the same shape. It may differ between training and evaluation.

    It stays a module in rewritten graphs, as dropout does, so that `train()` and `eval()` switch it and an export in
    evaluation mode sees none of what only training needs.
    """

    stored: bool = True
    """Whether its tensors belong to the adapter's file; training state does not."""

    def forward(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def reset(self, weight: Tensor, rng: Callable[[str], np.random.RandomState]) -> None:
        """Fill the transform's own tensors, after the factor's `weight` was filled."""

    def join(self, pool: dict[str, Any]) -> None:
        """Share with the adapter's other transforms what they have in common, kept in `pool` while it is inserted."""

    def penalty(self, weight: Tensor | None) -> Tensor | None:
        """What the transform adds to the training loss, a scalar, or `None`. A transform of no trained tensor gets no weight.
        See `graphpeft.train.penalty`."""
        return None


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's tensors by name, but for those of transforms that are not stored."""
    training = tuple(
        f"{n}." if n else "" for n, m in module.named_modules() if isinstance(m, Transform) and not m.stored
    )
    return {name: t for name, t in module.state_dict(keep_vars=True).items() if not name.startswith(training)}
