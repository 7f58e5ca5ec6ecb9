"""Whether two modules compute the same: compare structure, attributes and weight shapes, and watch integers.

`blocks.py` finds equal blocks with this. Objects of an unknown type are equal only if they are the same object.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn

from graphpeft.compat.fake_tensors import is_fake
from graphpeft.rewrite.adapters import HOME, Adapters

Watched = set[tuple[str, str]]
"""(path of the module below the block, attribute) of each integer that differs between blocks."""

PLAIN: frozenset[type] = frozenset(
    {type(None), bool, int, float, complex, str, bytes, slice, range}
    | {torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size}
)
"""Types of immutable values, which are interchangeable when they are equal."""
_BOOKKEEPING = frozenset(nn.Module().__dict__) - {"_non_persistent_buffers_set", "training"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def module_diff(one: nn.Module, other: nn.Module, exact: frozenset[str], wrapped: bool = False) -> Watched | None:
    """Integer attributes in which two blocks differ, or `None` if they differ in anything else.

    Integers named in `exact` must be equal. `wrapped` means that both blocks have graphpeft's `forward` on the instance
    and that their tensors were compared before. Adapters are ignored, because they are inactive during a capture.
    """
    pairs: dict[int, nn.Module] = {}
    found: Watched = set()
    queue = [("", one, other)]
    for path, a, b in queue:
        if id(a) in pairs:
            if pairs[id(a)] is not b:
                return None
            continue
        pairs[id(a)] = b
        if type(a) is not type(b) or not _understood(a) or not _understood(b):
            return None
        if not wrapped and not (_same_tensors(a._parameters, b._parameters) and _same_tensors(a._buffers, b._buffers)):
            return None
        below, beside = _children(a), _children(b)
        if list(below) != list(beside):
            return None
        prefix = f"{path}." if path else ""
        queue += [(f"{prefix}{name}", child, beside[name]) for name, child in below.items()]
    if not wrapped and not _same_ties(one, other):
        return None
    for path, a, b in queue:
        own, others = _attributes(a), _attributes(b)
        if wrapped and not path:
            own.pop("forward"), others.pop("forward")
        if own.keys() != others.keys() or "forward" in own:
            return None
        for name, value in own.items():
            if _same(value, others[name], pairs):
                continue
            if type(value) is not int or type(others[name]) is not int or name in exact:
                return None
            found.add((path, name))
    return found


def _understood(module: nn.Module) -> bool:
    """Whether everything that the module does is visible: no hooks, and no state outside its attributes."""
    hidden = isinstance(module, torch.jit.ScriptModule) or any("__slots__" in vars(c) for c in type(module).__mro__)
    return not hidden and not any(getattr(module, name) for name in _HOOKS)


def _children(module: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in module._modules.items() if m is not None and not (n == HOME and isinstance(m, Adapters))}


def _attributes(module: nn.Module) -> dict[str, Any]:
    empty = {n: None for n, m in module._modules.items() if m is None}
    return {**{n: v for n, v in module.__dict__.items() if n not in _BOOKKEEPING}, **empty}


def _same(a: Any, b: Any, pairs: dict[int, nn.Module]) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if type(a) in PLAIN:
        return bool(a == b)
    if type(a) in {tuple, list}:
        return len(a) == len(b) and all(_same(x, y, pairs) for x, y in zip(a, b, strict=True))
    if type(a) in {dict, OrderedDict}:
        return list(a) == list(b) and all(_same(v, b[k], pairs) for k, v in a.items())
    if type(a) in {set, frozenset}:
        return all(type(x) in PLAIN for x in a | b) and a == b
    if isinstance(a, nn.Module):
        return pairs.get(id(a)) is b
    if isinstance(a, types.MethodType):
        return a.__func__ is b.__func__ and _same(a.__self__, b.__self__, pairs)
    if type(a) is functools.partial:
        return all(_same(getattr(a, n), getattr(b, n), pairs) for n in ("func", "args", "keywords"))
    return False


def _same_tensors(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return list(a) == list(b) and all(_same_tensor(t, b[n]) for n, t in a.items())


def _same_tensor(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    # Other classes, such as those of quantized weights, may have state that cannot be compared here.
    known = type(a) is type(b) and (type(a) in {torch.Tensor, nn.Parameter} or is_fake(a))
    if not known or vars(a) != vars(b) or _layout(a) != _layout(b):
        return False
    values = not a.is_floating_point() and not a.is_complex() and not a.is_meta and not is_fake(a)
    return not values or torch.equal(a, b)


def _layout(t: torch.Tensor) -> tuple[Any, ...]:
    strides = t.stride() if t.layout is torch.strided else None
    return t.shape, strides, t.layout, t.dtype, t.device, t.requires_grad


def _same_ties(one: nn.Module, other: nn.Module) -> bool:
    """Whether the same parameters and buffers are tied in both blocks."""

    def ties(block: nn.Module) -> list[int]:
        first: dict[int, int] = {}
        held = [*block.named_parameters(remove_duplicate=False), *block.named_buffers(remove_duplicate=False)]
        base = [id(tensor) for name, tensor in held if f".{HOME}." not in f".{name}"]
        return [first.setdefault(tensor, i) for i, tensor in enumerate(base)]

    return ties(one) == ties(other)


class Used(RuntimeError):
    """A watched integer was used."""


@contextmanager
def trap_ints(block: nn.Module, places: Watched) -> Iterator[set[str]]:
    """Replace integers by objects that record any use and raise `Used`; yields the names of the used integers.

    The objects cannot be a subclass of `int`: C code, such as a tensor's arithmetic, reads the value of an `int`
    directly, without calling its methods, so this use would stay unnoticed.
    """
    used: set[str] = set()
    held = [(block.get_submodule(path).__dict__, name) for path, name in places]
    values = [attributes[name] for attributes, name in held]
    try:
        for attributes, name in held:
            attributes[name] = _watch(name, used)
        yield used
    finally:
        for (attributes, name), value in zip(held, values, strict=True):
            attributes[name] = value


def _watch(attribute: str, used: set[str]) -> Any:
    """An object whose special methods all record `attribute` and raise, even when `isinstance` asks for its class."""

    def note(*_: Any, **__: Any) -> NoReturn:
        used.add(attribute)
        raise Used(attribute)

    kept = {"__new__", "__init__", "__init_subclass__", "__subclasshook__", "__doc__", "__class__"}
    members: dict[str, Any] = dict.fromkeys(
        (set(dir(int)) | {"__iter__", "__len__", "__call__", "__contains__"}) - kept, note
    )
    return type("Watch", (), {**members, "__class__": property(note), "__getitem__": note, "__complex__": note})()
