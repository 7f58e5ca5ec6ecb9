"""The adapters' penalty on the training loss, and an optimizer hook that adds its gradient once per step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from graphpeft.chain import Transform
from graphpeft.compat.hooks import step_pre_hooks
from graphpeft.compat.sharded import gathered
from graphpeft.rewrite.entry import on_model
from graphpeft.rewrite.state import branches, chains, get_state
from graphpeft.train.tensors import weighted

if TYPE_CHECKING:
    from graphpeft.train.pac import PAC


def objectives(model: nn.Module) -> dict[str, PAC]:
    """The active adapters' objectives, each under the name of the first adapter that has it."""
    state = get_state(model)
    found = {name: state.adapters[name].objective for name in state.active}
    first = {id(objective): name for name, objective in reversed(found.items()) if objective is not None}
    return {name: found[name] for name in reversed(first.values())}


@on_model()
def penalty(model: nn.Module) -> Tensor:
    """The penalty of the active adapters' transforms and objectives: a differentiable scalar, 0 if there are none.

    On a model sharded by FSDP2 every process computes it from gathered tensors, and its gradients go to the shards.
    Raises `AdapterError` for a model without adapters.
    """
    active = tuple(get_state(model).active)
    with gathered(model, branches(model, *active)):
        return _penalty(model, active)


def _penalty(model: nn.Module, active: tuple[str, ...]) -> Tensor:
    modules = (m for name in active for chain in chains(model, name).values() for m in chain.modules())
    transforms: dict[Transform, Tensor | None] = {m: None for m in modules if isinstance(m, Transform)}
    factors = (factor for name in active for factor in weighted(model, name))
    transforms |= {transform: factor.weight for factor in factors for transform in factor.applied}
    terms = [term for t, weight in transforms.items() if (term := t.penalty(weight)) is not None]
    terms += [objective.penalty(model) for objective in objectives(model).values()]
    device = next(model.parameters()).device
    return sum((term.to(device) for term in terms), torch.zeros((), device=device))


@on_model()
def add_penalties(model: nn.Module, optimizer: Optimizer) -> RemovableHandle:
    """Add the gradient of `penalty` before every step of the optimizer, until `remove` of the returned handle is called.

    It is added once per step, regardless of the number of accumulated micro-batches, after a `GradScaler` has unscaled the
    gradients and after clipping: the penalty's own gradient is not clipped. The optimizer may be wrapped, as accelerate
    does. A second call for the same model and optimizer returns the same handle.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    for hook in step_pre_hooks(optimizer):
        if isinstance(hook, _Adder) and hook.model is model:
            return hook.handle
    adder = _Adder(model)
    adder.handle = optimizer.register_step_pre_hook(adder)
    return adder.handle


class _Adder:
    """The optimizer hook, as a class so that a second `add_penalties` recognizes it."""

    handle: RemovableHandle

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        with torch.enable_grad():
            value = penalty(self.model)
        parameters = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
        if not value.requires_grad or not parameters:
            return
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer unscales inside its step
        for parameter, grad in zip(parameters, torch.autograd.grad(value, parameters, allow_unused=True), strict=True):
            if grad is not None:
                grad = grad if scale is None else grad * scale.to(grad.device)
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
