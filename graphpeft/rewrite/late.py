"""Gradients that come too late: a backward pass through a forward pass that other adapters ran in.

An adapter's tensors stop training when it becomes inactive, and autograd drops their gradients without a word. A hook on each
tensor sees such a gradient come; in a forward pass it costs nothing. Reentrant checkpointing runs the forward pass again while it
goes backward, with whatever is active then, so there the adapters have to be those of the last forward pass.
"""

from __future__ import annotations

import sys
import weakref
from functools import partial
from types import FrameType

import torch
from torch import Tensor, nn

from graphpeft.compat.tensors import gradient_hooks
from graphpeft.errors import AdapterError
from graphpeft.rewrite.state import AdapterSet


def watch(parameter: nn.Parameter, state: AdapterSet) -> None:
    """Look at the gradients of an adapter's tensor, which has to be one that trains. A copy of it has no hooks."""
    for hook in gradient_hooks(parameter):
        if type(hook) is partial and hook.func is _seen:
            return
    if parameter.requires_grad and parameter.is_leaf:
        parameter.register_hook(partial(_seen, weakref.ref(parameter), weakref.ref(state)))


def _seen(parameter: weakref.ref[nn.Parameter], state: weakref.ref[AdapterSet], gradient: Tensor) -> None:
    held, record = parameter(), state()
    if held is None or record is None:
        return
    if not held.requires_grad:
        name, running = _name(record, held), ", ".join(record.active) or "none"
        raise AdapterError(
            f"A gradient reached adapter {name!r}, which is inactive now (active: {running}), and would be lost. Usually another "
            f"adapter was activated between the forward and the backward pass. Call backward before gp.activate, or let both "
            f"run in one pass with gp.activate(model, [{name!r}, ...])."
        )
    if record.ran is not None and record.ran != record.switches and _recomputing():
        raise AdapterError(
            f"Adapters were switched between the forward and the backward pass, and reentrant checkpointing ran the forward pass "
            f"again with others (now active: {', '.join(record.active) or 'none'}). Call backward before gp.activate, or use "
            f"use_reentrant=False."
        )


def _name(state: AdapterSet, parameter: nn.Parameter) -> str:
    for adapters in state.containers.values():
        for name in adapters.sites:
            if any(part is parameter for part in adapters.get_submodule(name).parameters()):
                return name
    return "?"


def _recomputing() -> bool:
    """Whether the gradient comes from a forward pass that reentrant checkpointing ran again."""
    code = torch.utils.checkpoint.CheckpointFunction.backward.__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False
