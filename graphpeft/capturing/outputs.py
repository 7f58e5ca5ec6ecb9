"""A model's outputs as tensors to compare."""

from __future__ import annotations

from typing import Any

import torch

from graphpeft.compat.pytree import tree_leaves


def floats(output: Any) -> list[torch.Tensor]:
    """Every floating-point tensor in a model's output, in order."""
    return [
        t
        for t in tree_leaves(dict(output) if hasattr(output, "keys") else output)
        if isinstance(t, torch.Tensor) and t.is_floating_point()
    ]


def difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The largest absolute difference between two outputs."""
    return max((float((a - b).abs().max()) for a, b in zip(one, other, strict=True) if a.numel()), default=0.0)
