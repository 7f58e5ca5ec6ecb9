"""The weight form: where a module reads its weight inside a fused operator, the weight itself is shown adapted."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from graphpeft.adapters import HOME, Adapters, slot
from graphpeft.program import Site


def weight_form(adapters: Adapters) -> dict[str, Any]:
    """Properties that return weight + delta under the weight's own name; the parameter itself stays where it is."""
    by_weight: dict[str, list[tuple[Site, nn.Module]]] = {}
    for site, branch, _ in adapters.running():
        by_weight.setdefault(site.weight.rpartition(".")[2], []).append((site, branch))
    return {"graph": None} | {name: property(_adapted_weight(name, tuple(found))) for name, found in by_weight.items()}


def _adapted_weight(name: str, found: tuple[tuple[Site, nn.Module], ...]) -> Any:
    places = tuple((site, slot(site)) for site, _ in found)

    def read(self: nn.Module) -> torch.Tensor:
        weight = cast(torch.Tensor, self._parameters[name])
        adapters = cast(Adapters, self._modules[HOME])
        for adapter in adapters.active:
            modules = cast(nn.ModuleDict, adapters._modules[adapter])
            for site, key in places:
                if key in modules:
                    weight = fold(weight, site, cast(Any, modules[key]).delta())
        return weight

    return read


def fold(weight: torch.Tensor, site: Site, delta: torch.Tensor) -> torch.Tensor:
    """weight + delta, summed in the wider dtype and cast last; `weight` itself is not changed. delta is (out, in)."""
    if site.transposed:
        delta = delta.t()
    wide = torch.promote_types(weight.dtype, delta.dtype)
    return (weight.to(wide) + delta.to(wide)).to(weight.dtype)
