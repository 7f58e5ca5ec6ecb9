"""`gp.trainable`: count the parameters that train."""

from __future__ import annotations

from torch import nn

from graphpeft.rewrite.entry import on_model


@on_model(intact=False)
def trainable(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameter counts of a model; shared tensors count once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, required in sizes if required), sum(n for n, _ in sizes)
