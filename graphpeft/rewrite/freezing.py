"""Which parameters of a model train."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def require(model: nn.Module, required: Mapping[str, bool]) -> None:
    """Let parameters train, or freeze them, but for those that are gone, as a head that was replaced. Those made in inference
    mode never train, and torch forbids to say that they do."""
    held = dict(model.named_parameters(remove_duplicate=False))
    for name, trained in required.items():
        if name in held and not held[name].is_inference():
            held[name].requires_grad_(trained)
