"""The record compared with the modules: what other code did to an adapted model meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from graphpeft.compat.sharded import in_flat_shards
from graphpeft.errors import AdapterError
from graphpeft.ir.weights import get_parameter
from graphpeft.rewrite.adapters import Adapters, home
from graphpeft.rewrite.owner import Adapted
from graphpeft.rewrite.state import AdapterSet

Edge = tuple[dict[str, Any], str, nn.Module]
"""A module on the way to an owner, with the dictionary of its parent's children and its name there."""
WatchedWeight = tuple[nn.Module, type, dict[str, Any], str, Any, torch.Size | None]
Watched = tuple[tuple[Edge, ...], tuple[WatchedWeight, ...]]
Spot = tuple[nn.Module, tuple[tuple[dict[str, Any], str, bool], ...]]
"""An owner, and where its adapted weights stand."""


def located(model: nn.Module, state: AdapterSet) -> dict[str, nn.Module | None]:
    """The module at each owner's path, `None` if there is none. Owners share the way to their parents."""
    known: dict[str, nn.Module | None] = {"": model}

    def find(path: str) -> nn.Module | None:
        if path not in known:
            parent, _, name = path.rpartition(".")
            above = find(parent)
            known[path] = None if above is None else above._modules.get(name)
        return known[path]

    return {path: find(path) for path in state.containers}


def watched(model: nn.Module, state: AdapterSet, owners: Mapping[str, nn.Module | None]) -> Watched:
    """What the check before a forward pass compares, as flat tuples: the modules on the way to each owner, its class, and each
    adapted weight by the dictionary of its holder. By path this would take a millisecond for a large model."""
    weights: list[WatchedWeight] = []
    spots: dict[str, Spot] = {}
    for path, adapters in state.containers.items():
        owner = owners.get(path)
        if owner is None:
            continue
        spot = state.spots.get(path)
        if spot is None or spot[0] is not owner:
            spot = _spot(path, owner, adapters)
        spots[path] = spot
        kind = owner.__class__
        for parameters, leaf, resizable in spot[1]:
            weight = parameters.get(leaf)
            shape = weight.shape if resizable and weight is not None else None
            weights.append((owner, kind, parameters, leaf, weight, shape))
    edges = state.watched[0] if state.watched is not None and spots.keys() == state.spots.keys() else None
    if edges is None or any(modules.get(name) is not module for modules, name, module in edges):
        edges = tuple(_edges(model, spots))
    state.spots = spots
    return edges, tuple(weights)


def _edges(model: nn.Module, paths: Iterable[str]) -> Iterator[Edge]:
    ways = dict.fromkeys(
        path[:end] for path in paths for end in (*(i for i, c in enumerate(path) if c == "."), len(path))
    )
    for way in ways:
        parent, _, name = way.rpartition(".")
        if way:
            modules = cast("dict[str, Any]", model.get_submodule(parent)._modules)
            yield modules, name, modules[name]


def same(state: AdapterSet) -> bool:
    """Whether every owner is the module, of the class and with the weights, that `watched` saw."""
    if state.watched is None:
        return False
    edges, watched_weights = state.watched
    for modules, name, module in edges:
        if modules.get(name) is not module:
            return False
    for owner, kind, parameters, leaf, weight, shape in watched_weights:
        if owner.__class__ is not kind or parameters.get(leaf) is not weight:
            return False
        if shape is not None and weight.shape != shape:
            return False
    return True


def _spot(path: str, owner: nn.Module, adapters: Adapters) -> Spot:
    places = (site for sites in adapters.sites.values() for site in sites.values())
    # A table that is tied is resized in place.
    weights = {site.weight: site.role in ("embed", "head") or bool(site.tied) for site in places}
    held = []
    for weight, resizable in weights.items():
        inner, _, leaf = weight[len(path) + 1 if path else 0 :].rpartition(".")
        try:
            held.append((owner.get_submodule(inner)._parameters, leaf, resizable))
        except AttributeError:
            continue
    return owner, tuple(held)


def differences(model: nn.Module, state: AdapterSet) -> dict[str, str]:
    """What is no longer as the record says, by the owner's path. Empty if all is well."""
    found = {}
    owners = located(model, state)
    for path, adapters in state.containers.items():
        owner = owners[path]
        if owner is None:
            found[path] = "is gone"
            continue
        expected = state.attached and not adapters.detached
        if expected and home(owner) is not adapters:
            found[path] = f"was replaced by another {type(owner).__name__}, which has no adapters"
        elif torch.nn.utils.parametrize.is_parametrized(owner):
            found[path] = "was parametrized after its adapters came"
        elif expected and adapters.active and not isinstance(owner, Adapted):
            found[path] = f"was given the class {type(owner).__name__}, which runs no adapters"
        elif (loose := _resized(model, adapters)) is not None:
            found[path] = loose
    return found


def _resized(model: nn.Module, adapters: Adapters) -> str | None:
    for site in (site for sites in adapters.sites.values() for site in sites.values()):
        if in_flat_shards(model.get_submodule(site.weight.rpartition(".")[0])):  # their shapes tell nothing
            continue
        try:
            weight: torch.Tensor = get_parameter(model, site.weight)
        except AdapterError:  # pruning and FSDP1 put a plain tensor in its place
            path, _, leaf = site.weight.rpartition(".")
            try:
                found = model.get_submodule(path).__dict__.get(leaf)
            except AttributeError:
                found = None
            if not isinstance(found, torch.Tensor):
                return f"has no parameter {site.weight} any more"
            weight = found
        wanted = (site.full or site.outputs) * site.inputs * (site.stack or 1)
        if (
            weight.is_floating_point()
            and type(weight) in (nn.Parameter, torch.Tensor)
            and weight.numel() not in (0, wanted)
        ):
            return f"has another shape: {site.weight} is now {tuple(weight.shape)}"
    return None


def changed(model: nn.Module, state: AdapterSet, action: str = "run") -> None:
    """Raise `AdapterError` if an owner is no longer what its adapters were made for."""
    if same(state):
        return
    found = differences(model, state)
    if found:
        path, what = next(iter(found.items()))
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise AdapterError(
            f"Cannot {action} {type(model).__name__}: {path or 'the model'} {what}{more}, so its adapter does not act there. "
            f"Usually a head was replaced, or resize_token_embeddings ran after gp.apply. gp.save still writes every adapter; "
            f"gp.remove(model) takes the adapters off, and gp.apply or gp.load on the changed model adds them anew."
        )
