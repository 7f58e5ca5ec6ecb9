"""The hooks on a module or an optimizer: torch adds and removes them by handle, and has no public way to look."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module


def has_pre_hook(module: nn.Module, hook: Callable[..., Any]) -> bool:
    """Whether this function runs before the module's `forward`."""
    return any(found is hook for found in module._forward_pre_hooks.values())


def remove_pre_hook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Take this function off the module."""
    for key in [key for key, found in module._forward_pre_hooks.items() if found is hook]:
        del module._forward_pre_hooks[key]


def step_pre_hooks(optimizer: torch.optim.Optimizer) -> list[Callable[..., Any]]:
    """What runs before the optimizer's `step`."""
    return list(optimizer._optimizer_step_pre_hooks.values())


def has_global_hooks() -> bool:
    """Whether hooks run around the `forward` of every module there is."""
    return any(getattr(torch_module, f"_global_{hooks}") for hooks in ("forward_hooks", "forward_pre_hooks"))


def remove_state_hooks(module: nn.Module, *hooks: Callable[..., Any]) -> None:
    """Take these functions off the module's `state_dict` and `load_state_dict`."""
    for held in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key in [key for key, found in held.items() if getattr(found, "hook", found) in hooks]:
            del held[key]
