"""What the root model remembers of its adapters, and the queries that other passes ask of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from graphpeft.chain import Chain, Factor
from graphpeft.chain.transform import stored_tensors
from graphpeft.compat.quantized import dequantize
from graphpeft.compat.sharded import full_tensor
from graphpeft.errors import AdapterError
from graphpeft.ir.site import Site
from graphpeft.ir.weights import float_weight
from graphpeft.planning.plan import Entry
from graphpeft.rewrite.adapters import HOME, Adapters, home, places
from graphpeft.rewrite.owner import STATE, refuse_replaced, relower


@dataclass
class Adapter:
    """One adapter: the rules it was made from, the seed of its random tensors, and its sites."""

    rules: str
    seed: int
    entries: tuple[Entry, ...]
    objective: Any = None
    """What training adds to the loss for the adapter as a whole (see `graphpeft.train.PAC`)."""


@dataclass
class State:
    """Kept on the root model under one private attribute; refers to modules by path only, so copies stay whole."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    required: dict[str, bool] = field(default_factory=dict)
    """`requires_grad` of every base parameter before the first adapter came."""
    held: tuple[str, ...] = ()
    """Quantized layers that keep the order of their weights while there are adapters (see `quantized.hold_order`)."""
    merged: tuple[str, ...] = ()
    originals: dict[str, torch.Tensor] = field(default_factory=dict)
    """Base weights as they were before the merge."""
    parked: dict[str, Adapters] = field(default_factory=dict)
    """While merged, the adapters of each owner, taken off the module tree so that the model is plain."""
    inside: tuple[str, ...] = ()
    """Contexts that will put back what was active before them."""
    inputs: Any = None
    """The example call that `apply` was given, for views that capture the model again."""


def find_state(model: nn.Module) -> State | None:
    found = model.__dict__.get(STATE)
    return found if isinstance(found, State) else None


def get_state(model: nn.Module) -> State:
    """The model's state. Raises `AdapterError` for a model without adapters."""
    state = find_state(model)
    if state is None:
        inside = next(
            (path for path, m in model.named_modules() if find_state(m) is not None or home(m) is not None), None
        )
        hint = (
            f"Its submodule {inside or HOME!r} was adapted: pass the model that gp.apply was called on."
            if inside
            else "Call gp.apply(model, rules) or gp.load(model, folder) first."
        )
        raise AdapterError(f"{type(model).__name__} has no adapters. {hint}")
    return state


def example(model: nn.Module, inputs: Any) -> Any:
    """These inputs, or else those that the model was adapted with."""
    state = find_state(model)
    return state.inputs if inputs is None and state is not None else inputs


def names(model: nn.Module, wanted: str | tuple[str, ...] | list[str] | None) -> tuple[str, ...]:
    """Adapter names, checked, each once; `None` stands for all of them."""
    state = get_state(model)
    if wanted is None:
        return tuple(state.adapters)
    listed = (wanted,) if isinstance(wanted, str) else tuple(dict.fromkeys(wanted))
    for name in listed:
        if name not in state.adapters:
            raise AdapterError(
                f"There is no adapter {name!r} on {type(model).__name__}; there are: {', '.join(state.adapters) or 'none'}. "
                f"Check the name given to gp.apply or gp.load."
            )
    return listed


def owners(model: nn.Module, adapters: tuple[str, ...]) -> dict[str, nn.Module]:
    """Path and module of every owner that the adapters touch, in graph order."""
    state = get_state(model)
    paths = dict.fromkeys(p.owner for name in adapters for e in state.adapters[name].entries for p in places(e.site))
    return {path: model.get_submodule(path) for path in paths}


def chains(model: nn.Module, name: str) -> dict[Site, Chain]:
    """The branches of one adapter by site; also while merged."""
    state = get_state(model)
    found: dict[Site, Chain] = {}
    for path in dict.fromkeys(e.site.owner for e in state.adapters[name].entries):
        adapters = state.parked.get(path) or home(model.get_submodule(path))
        assert adapters is not None, f"the owner {path} lost its adapters"
        found.update({site: branch for site, branch, _ in adapters.branches(name) if isinstance(branch, Chain)})
    return {e.site: found[e.site] for e in state.adapters[name].entries}


def branches(model: nn.Module, *names: str) -> list[nn.Module]:
    """Every module of the branches of some adapters, once."""
    return list(dict.fromkeys(m for name in names for chain in chains(model, name).values() for m in chain.modules()))


def base_weight(model: nn.Module, name: str) -> torch.Tensor:
    """A weight as it was before any merge, whole and without gradients; of a quantized one the floats that it stands for."""
    state = find_state(model)
    original = state.originals.get(name) if state else None
    return float_weight(model, name) if original is None else full_tensor(dequantize(original)).detach()


def saved(site: Site, chain: Chain) -> list[tuple[str, torch.Tensor]]:
    """Keys and tensors of a branch that belong into a file; what sites share has one key."""
    found = []
    for place, factor in enumerate(chain.factors):
        assert isinstance(factor, Factor)
        prefix = f"shared:{factor.shared}" if factor.shared else f"{site.key}.{place}"
        found += [(f"{prefix}.{leaf}", tensor) for leaf, tensor in factor.saved().items()]
    around = {name: part for name in ("reweight", "before") if (part := getattr(chain, name)) is not None}
    for name, part in around.items():
        found += [(f"{site.key}.{name}.{leaf}", tensor) for leaf, tensor in stored_tensors(part).items()]
    return found


def refuse_merged(model: nn.Module, action: str) -> None:
    """Raise `AdapterError` if adapters are folded into the weights, or a context will put back what it found."""
    refuse_inside(model, action)
    state = find_state(model)
    if state is not None and state.merged:
        raise AdapterError(
            f"Cannot {action} while {', '.join(state.merged)} is merged: the weights are not the base's. "
            f"Call gp.unmerge(model) first."
        )


def refuse_inside(model: nn.Module, action: str) -> None:
    state = find_state(model)
    if state is not None and state.inside:
        raise AdapterError(
            f"Cannot {action} inside of `with {state.inside[-1]}(...)`, which puts back what it found. Leave it first."
        )


@contextmanager
def inside(model: nn.Module, context: str) -> Iterator[None]:
    """The adapters stay who they are for a while."""
    state = get_state(model)
    state.inside += (context,)
    try:
        yield
    finally:
        state.inside = state.inside[:-1]


def set_active(model: nn.Module, active: tuple[str, ...]) -> None:
    """Make exactly `active` run and train, lowering the owners that change."""
    state = get_state(model)
    found = owners(model, tuple(state.adapters)).values()
    for module in found:
        refuse_replaced(module)
    for module in found:
        adapters = home(module)
        if adapters is None:
            continue
        here = tuple(n for n in active if n in adapters.sites)
        if here != adapters.active:
            adapters.active = here
            relower(module)
    state.active = active
    for name in state.adapters:
        for chain in chains(model, name).values():
            chain.requires_grad_(name in active)
        objective = state.adapters[name].objective
        if objective is not None and objective.frozen:
            objective.freeze(model)


@contextmanager
def inactive(model: nn.Module) -> Iterator[None]:
    """The base model for a while, whichever adapters are active."""
    state = find_state(model)
    if state is None or state.merged or not state.active:
        yield
        return
    active = state.active
    set_active(model, ())
    try:
        yield
    finally:
        set_active(model, active)


@contextmanager
def hidden(model: nn.Module) -> Iterator[None]:
    """Resting adapters off the module tree for a while.

    torch.export gives modules other paths as soon as one of them stands in two places, as what adapters share does.
    """
    held = {owner: dict(owner._modules) for owner in model.modules() if home(owner) is not None}
    held = {owner: modules for owner, modules in held.items() if not isinstance(owner, fx.GraphModule)}
    try:
        for owner in held:
            del owner._modules[HOME]
        yield
    finally:
        for owner, modules in held.items():
            owner._modules.clear()
            owner._modules.update(modules)
