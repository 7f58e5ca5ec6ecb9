"""Modules whose `forward` was replaced on the instance: by accelerate's hooks, which are looked through, or by others.

`accelerate.dispatch_model`, and transformers' `device_map` with it, keep the module's own `forward` under a private name, and
may keep its weights elsewhere: on the meta device there is none to see but while it runs. All that graphpeft knows of
accelerate's private names is in this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

INNER, HOOK = "_old_forward", "_hf_hook"
"""Where a hooked module keeps the bound method that its hook calls, and the hook."""


def _bound(module: nn.Module) -> list[str]:
    """Attributes of the instance that are the `forward` of its class: within a hook, or left by one that was removed."""
    own = type(module).forward
    return [name for name in ("forward", INNER) if getattr(module.__dict__.get(name), "__func__", None) is own]


def has_instance_forward(module: nn.Module) -> bool:
    """Whether code on the instance hides that of the class, so that a rewritten class would not be called."""
    return "forward" in module.__dict__ and not _bound(module)


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a module another class, whose `forward` a hook around the old one's calls from now on."""
    bound = _bound(module)
    module.__class__ = kind
    for name in bound:
        module.__dict__[name] = MethodType(kind.forward, module)


@contextmanager
def unhooked(model: nn.Module) -> Iterator[None]:
    """The modules without their hooks for a while: a capture needs no weights, and hooks would fetch them."""
    held: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for attributes in [module.__dict__ for module in model.modules() if _bound(module)]:
        held.append((attributes, dict(attributes)))
        for name in ("forward", INNER, HOOK):
            attributes.pop(name, None)
    try:
        yield
    finally:
        for attributes, before in held:
            attributes.update((name, before[name]) for name in ("forward", INNER, HOOK) if name in before)


def offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the module's own weights elsewhere while it does not run."""
    if HOOK not in module.__dict__:
        return False
    from accelerate.utils import has_offloaded_params

    return bool(has_offloaded_params(module))


@contextmanager
def materialized(module: nn.Module) -> Iterator[None]:
    """The module with its own weights where it runs, for a while."""
    if not offloaded(module):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def device_of(module: nn.Module, weight: torch.Tensor) -> torch.device:
    """Where a weight of the module is when it runs."""
    return torch.device(module.__dict__[HOOK].execution_device) if offloaded(module) else weight.device
