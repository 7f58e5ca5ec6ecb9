"""What adapters add to the training loss, and an optimizer that adds its gradient once per step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from graphpeft.chain import Transform
from graphpeft.state import chains, get_state


def penalty(model: nn.Module) -> Tensor:
    """What the active adapters' transforms and objectives add to the loss: a differentiable scalar, 0 if nothing.

    Raises `AdapterError` for a model without adapters.
    """
    terms: dict[Transform, Tensor] = {}  # a factor that sites share counts once
    for name in get_state(model).active:
        for chain in chains(model, name).values():
            for factor in chain.factors:
                for transform in getattr(factor, "transforms", ()):
                    term = None if transform in terms else transform.penalty(factor.weight)
                    if term is not None:
                        terms[transform] = term
    adapters = get_state(model).adapters
    objectives = {id(o): o for n in get_state(model).active if (o := adapters[n].objective) is not None}
    device = next(model.parameters()).device
    found = [*terms.values(), *(objective.penalty(model) for objective in objectives.values())]
    return sum((term.to(device) for term in found), torch.zeros((), device=device))


def add_penalties(model: nn.Module, optimizer: torch.optim.Optimizer) -> RemovableHandle:
    """Add the gradient of `penalty` before every step of the optimizer; the handle's `remove` ends it.

    It counts once per step, however many micro-batches were accumulated.
    """

    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        with torch.enable_grad():
            value = penalty(model)
        parameters = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
        if not value.requires_grad or not parameters:
            return
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer unscales inside its step
        for parameter, grad in zip(parameters, torch.autograd.grad(value, parameters, allow_unused=True), strict=True):
            if grad is not None:
                grad = grad if scale is None else grad * scale.to(grad.device)
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad

    return optimizer.register_step_pre_hook(hook)
