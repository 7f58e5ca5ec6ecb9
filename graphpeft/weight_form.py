"""The weight form: where a module reads its weight inside a fused operator, the weight itself is shown adapted.

Only the model's own computation is shown weight + ΔW. Everything else that asks for the weight meets the parameter as it is
stored: `fully_shard` looks it up by name and shards what it finds, pruning and quantizers read it and write it back, and each
of them would fold ΔW into the base for good. Who is asking is told from the call stack (`_computing`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from types import FrameType
from typing import Any, cast

import torch
from torch import nn

from graphpeft.adapters import HOME, Adapters, slot
from graphpeft.errors import AdapterError
from graphpeft.program import Site, layout, oriented
from graphpeft.quantized import dense

Named = tuple[str, str, Site]
"""The name of an adapter, that of a branch in it, and the branch's site."""

TOOLS = ("torch.distributed.", "torch.nn.utils.", "torchao.", "accelerate.", "deepspeed.", "bitsandbytes.")
"""Packages whose code looks after parameters, also while a model runs: in hooks around `forward`."""


def weight_form(adapters: Adapters, forward: Callable[..., Any]) -> dict[str, Any]:
    """Members of a class whose instances show weight + ΔW under the weight's own name; the parameter itself stays.

    `forward` is what the class would run otherwise.
    """
    by_weight: dict[str, list[Named]] = {}
    for adapter in adapters.active:
        for site, _, _ in adapters.branches(adapter):
            if site.form == "weight":
                by_weight.setdefault(site.weight.rpartition(".")[2], []).append((adapter, slot(site), site))
    shown = {name: _property(name, tuple(places)) for name, places in by_weight.items()}
    return {**shown, "forward": _keeping(forward)}


def _keeping(forward: Callable[..., Any]) -> Any:
    """`forward` with each adapted weight made once, when it is first read: loops over experts read theirs many times.

    A module around that reads the weight past this `forward`, as `nn.MultiheadAttention` does, has it made anew.
    """

    @wraps(forward)
    def kept(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        adapters = cast(Adapters, self._modules[HOME])
        if adapters.shown is not None:  # the module calls itself
            return forward(self, *args, **kwargs)
        adapters.shown = {}
        try:
            return forward(self, *args, **kwargs)
        finally:
            adapters.shown = None

    return kept


def _property(name: str, places: tuple[Named, ...]) -> property:
    def read(self: nn.Module) -> torch.Tensor:
        adapters, base = cast(Adapters, self._modules[HOME]), _base(self, name)
        if adapters.shown is None and not _computing(places[0][2].weight):
            return base
        # A weight made without gradients is not one to train with.
        key = name, torch.is_grad_enabled()
        if adapters.shown is not None and key in adapters.shown:
            return adapters.shown[key]
        weight = base = dense(base, self)
        for adapter, branch, site in places:
            branches = cast(nn.ModuleDict, adapters._modules[adapter])
            weight = fold(weight, site, update(branches[branch], base, site))
        if adapters.shown is not None:
            adapters.shown[key] = weight
        return weight

    def write(self: nn.Module, value: Any) -> None:
        self.__dict__[name] = value

    def delete(self: nn.Module) -> None:
        self.__dict__.pop(name)

    return property(read, write, delete)


def _base(owner: nn.Module, name: str) -> torch.Tensor:
    """The weight as it is stored: a parameter, or the plain tensor that pruning and FSDP1 put in its place."""
    found = owner._parameters.get(name, owner.__dict__.get(name))
    if found is None:
        raise AttributeError(f"{type(owner).__name__!r} object has no attribute {name!r}")
    return found


def _computing(path: str) -> bool:
    """Whether the weight at `path` is asked for by a model that runs, rather than by a tool.

    It is called by a property, so the code that asks is two frames up. A parent may read the weight of its child in any helper
    of its own, hence it is enough that some module is being called further up. Tools may be at work there too: FSDP asks
    for parameters in hooks around `forward`; their code is known by its package. Traced code asks only in order to compute.

    Raises `AdapterError` for a parametrization, which reads the parameter first of all: it would hide ΔW for good.
    """
    if torch.compiler.is_compiling():
        return True
    frame: FrameType | None = sys._getframe(2)
    assert frame is not None, "a property is read by somebody"
    asking = str(frame.f_globals.get("__name__"))
    if asking == "torch.nn.utils.parametrize":
        raise AdapterError(
            f"{path} is read as weight + ΔW, and a parametrization would hide ΔW, so that the adapter would do nothing. Nothing "
            f"was changed. Call gp.merge(model) or gp.remove(model) before you parametrize the module."
        )
    if asking.startswith(TOOLS):
        return False
    while frame is not None:
        if frame.f_code is nn.Module.__call__.__code__ or frame.f_code.co_name == "forward":
            return True
        frame = frame.f_back
    return False


def update(branch: Any, weight: torch.Tensor, site: Site) -> torch.Tensor:
    """ΔW of a branch on a base weight as it is stored; most branches do not look at it."""
    return branch.delta(oriented(weight, *layout(site)) if getattr(branch, "relative", False) else None)


def fold(weight: torch.Tensor, site: Site, delta: torch.Tensor) -> torch.Tensor:
    """The weight of a site with `delta` added to it."""
    return added(weight, delta, site.transposed)


def added(weight: torch.Tensor, delta: torch.Tensor, transposed: bool) -> torch.Tensor:
    """weight + delta, summed in the wider dtype and cast last; `weight` itself is not changed.

    `delta` is (out, in), or a stack of such; it takes the weight's shape, as that of a convolution.
    """
    if transposed:
        delta = delta.transpose(-1, -2)
    wide = torch.promote_types(weight.dtype, delta.dtype)
    return (weight.to(wide) + delta.to(wide).reshape(weight.shape)).to(weight.dtype)
