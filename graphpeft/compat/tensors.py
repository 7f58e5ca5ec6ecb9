"""What torch keeps on tensors under private names: writes, hooks, and subclasses without elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound=Tensor)


def version(tensor: Tensor) -> int:
    """How often the tensor was written to in place, as autograd counts; -1 where it does not count."""
    return -1 if tensor.is_inference() else tensor._version


def gradient_hooks(tensor: Tensor) -> list[Callable[..., Any]]:
    """What runs when a gradient reaches the tensor."""
    hooks = tensor._backward_hooks
    return [] if hooks is None else list(hooks.values())


def without_elements(kind: type[T]) -> T:
    """A tensor of this class that has no elements. Unlike `as_subclass` it is made past all modes, as in a capture."""
    made: T = torch.Tensor._make_subclass(kind, _NOTHING)
    return made


_NOTHING = torch.empty(0)
