"""Modules whose `forward` was replaced on the instance, by accelerate's hooks or by other code.

`accelerate.dispatch_model`, and transformers' `device_map` through it, keep the module's own `forward` under a private
name. They may also keep its weights elsewhere: then the module has its weights only while it runs, and meta tensors
otherwise. graphpeft looks through these hooks; no other file uses accelerate's private names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

INNER, HOOK = "_old_forward", "_hf_hook"
"""Attributes in which a hooked module keeps the bound method that its hook calls, and the hook."""


def _bound(module: nn.Module) -> list[str]:
    """Attributes of the instance that hold the `forward` of its class: used by a hook, or left by a removed one."""
    own = type(module).forward
    return [name for name in ("forward", INNER) if getattr(module.__dict__.get(name), "__func__", None) is own]


def has_instance_forward(module: nn.Module) -> bool:
    """Whether the instance has another `forward` than its class, so that a rewritten class would not be called."""
    return "forward" in module.__dict__ and not _bound(module)


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Set the module's class and point accelerate's hook at the new `forward`."""
    bound = _bound(module)
    object.__setattr__(module, "__class__", kind)  # past the checks of `nn.Module.__setattr__`
    for name in bound:
        module.__dict__[name] = MethodType(kind.forward, module)


@contextmanager
def unhooked(model: nn.Module) -> Iterator[None]:
    """Remove the modules' hooks inside the context: a capture needs no weights, and hooks would load them."""
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
    """Whether accelerate keeps the module's own weights elsewhere while the module does not run."""
    if HOOK not in module.__dict__:
        return False
    from accelerate.utils import has_offloaded_params

    return bool(has_offloaded_params(module))


@contextmanager
def materialized(module: nn.Module) -> Iterator[None]:
    """Load the module's own weights onto its execution device inside the context."""
    if not offloaded(module):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def device_of(module: nn.Module, weight: torch.Tensor) -> torch.device:
    """The device of a weight of the module while the module runs."""
    return torch.device(module.__dict__[HOOK].execution_device) if offloaded(module) else weight.device
