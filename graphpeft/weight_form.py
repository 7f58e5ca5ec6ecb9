"""The weight form: where a module reads its weight inside a fused operator, the weight itself is shown adapted."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import torch
from torch import nn

from graphpeft.adapters import HOME, Adapters, slot
from graphpeft.program import Site, layout, oriented

Named = tuple[str, Site]
"""The name of an adapter, and one of its sites."""


def weight_form(adapters: Adapters, forward: Callable[..., Any]) -> dict[str, Any]:
    """Members of a class whose instances show weight + delta under the weight's own name; the parameter itself stays.

    `forward` is what the class would run otherwise.
    """
    by_weight: dict[str, list[Named]] = {}
    for adapter in adapters.active:
        for site, _, _ in adapters.branches(adapter):
            if site.form == "weight":
                by_weight.setdefault(site.weight.rpartition(".")[2], []).append((adapter, site))
    shown = {name: property(_adapted_weight(name, tuple(places))) for name, places in by_weight.items()}
    return {**shown, "forward": _keeping(forward)}


def _keeping(forward: Callable[..., Any]) -> Any:
    """`forward` with each adapted weight made once, when it is first read: loops over experts read theirs many times.

    Whatever reads a weight from outside, as `nn.MultiheadAttention` does of its child, has it made anew.
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


def _adapted_weight(name: str, places: tuple[Named, ...]) -> Any:
    def read(self: nn.Module) -> torch.Tensor:
        adapters = cast(Adapters, self._modules[HOME])
        # A weight made without gradients is not one to train with.
        key = name, torch.is_grad_enabled()
        if adapters.shown is not None and key in adapters.shown:
            return adapters.shown[key]
        base = weight = cast(torch.Tensor, self._parameters[name])
        for adapter, site in places:
            branches = cast(nn.ModuleDict, adapters._modules[adapter])
            weight = fold(weight, site, update(branches[slot(site)], base, site))
        if adapters.shown is not None:
            adapters.shown[key] = weight
        return weight

    return read


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
