"""The adapters of a model as one object, and the queries that passes ask of it.

The record is what the user asked for; what the modules run is derived from it (see `sync`). It refers to modules by path and to
the containers of adapters themselves, so a copy of the model has a record of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from graphpeft.chain import Chain, Factor
from graphpeft.chain.transform import stored_tensors
from graphpeft.compat.quantized import dequantize
from graphpeft.compat.sharded import full_tensor
from graphpeft.errors import AdapterError
from graphpeft.ir.site import Site
from graphpeft.ir.weights import float_weight
from graphpeft.planning.plan import Entry
from graphpeft.rewrite.adapters import HOME, Adapters, home, places
from graphpeft.rewrite.rows import Assignment

STATE = "_graphpeft"
"""Attribute of the root model that holds its `AdapterSet`."""


@dataclass
class Adapter:
    """One adapter: the rules it was made from, the seed of its random tensors, and its sites."""

    rules: str
    seed: int
    entries: tuple[Entry, ...]
    objective: Any = None
    """What training adds to the loss for the adapter as a whole (see `graphpeft.train.PAC`)."""


@dataclass
class Merge:
    """Adapters that are folded into the weights, and what un-merging needs."""

    names: tuple[str, ...]
    originals: dict[str, torch.Tensor]
    """Weights as they were before the merge."""
    versions: dict[str, int] = field(default_factory=dict)
    """How often each merged weight had been written to when the merge was done."""
    complete: bool = False
    """Whether every weight is written. Until then, and again when it is undone, `sync` puts the originals back."""


@dataclass(frozen=True)
class Context:
    """An open context that changed what runs, and what it puts back at its end."""

    name: str
    """What the user entered, such as `gp.disabled`; empty for our own, which nobody else runs in."""
    active: dict[str, float]
    rows: Assignment | None
    attached: bool
    alive: weakref.ref[Any]
    """Dead as soon as the context's code is gone, also when it could not finish."""


@dataclass
class AdapterSet:
    """What is asked of a model: kept on the root under one private attribute."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    """The adapters that run, in order, each with its strength."""
    containers: dict[str, Adapters] = field(default_factory=dict)
    """By the owner's path, where it keeps its branches."""
    attached: bool = True
    """Whether the containers are in the module tree. Not while merged, nor while the base is captured."""
    merge: Merge | None = None
    rows: Assignment | None = None
    """While every row of a batch has adapters of its own, which."""
    contexts: tuple[Context, ...] = ()
    base_requires_grad: dict[str, bool] = field(default_factory=dict)
    """`requires_grad` of every base parameter before the first adapter came."""
    reorder_disabled: tuple[str, ...] = ()
    """Quantized layers that keep the order of their weights while there are adapters (see `quantized.hold_order`)."""
    inputs: Any = None
    """The example call that `apply` was given, for views that capture the model again."""

    switches: int = 0
    """How often other adapters were made to run."""
    switched_rows: Assignment | None = None
    """The rows at the last switch."""
    ran: int | None = None
    """The switches that there had been at the last forward pass of the model with gradients."""
    applied: dict[str, tuple[bool, float]] = field(default_factory=dict)
    """By adapter, whether its tensors train and its strength, as they were last set."""
    pending: bool = False
    """Whether a change of the record may not have reached the modules yet."""
    tentative: tuple[str, dict[str, float]] | None = None
    """An adapter that is being added, and what was active before: undone if that does not come to its end."""
    journal: tuple[Any, ...] = ()
    """Work that has to be finished once begun: see `sync`."""
    spots: dict[str, Any] = field(default_factory=dict, repr=False)
    """Where the owners and their adapted weights stand (see `reality`)."""
    watched: Any = field(default=None, repr=False)
    """What the check before each forward pass compares (see `reality`)."""

    @property
    def merged(self) -> tuple[str, ...]:
        return self.merge.names if self.merge is not None else ()

    @property
    def originals(self) -> dict[str, torch.Tensor]:
        return self.merge.originals if self.merge is not None else {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy is whole and unlocked: it runs what the model runs, without the contexts, which belong to the code that entered
        them. Of our own contexts, in which the model is being looked at, it has nothing."""
        ours = next((context for context in self.contexts if not context.name), None)
        before = {} if ours is None else {"active": ours.active, "rows": ours.rows, "attached": ours.attached}
        return {**self.__dict__, **before, "contexts": (), "watched": None, "spots": {}, "ran": None, "pending": True}


def find_state(model: nn.Module) -> AdapterSet | None:
    found = model.__dict__.get(STATE)
    return found if isinstance(found, AdapterSet) else None


def get_state(model: nn.Module) -> AdapterSet:
    """The model's record. Raises `AdapterError` for a model without adapters."""
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


def owner_paths(state: AdapterSet, adapters: tuple[str, ...]) -> tuple[str, ...]:
    """The path of every owner that the adapters touch, in graph order."""
    return tuple(
        dict.fromkeys(p.owner for name in adapters for e in state.adapters[name].entries for p in places(e.site))
    )


def owners(model: nn.Module, adapters: tuple[str, ...]) -> dict[str, nn.Module]:
    """Path and module of every owner that the adapters touch, in graph order."""
    return {path: model.get_submodule(path) for path in owner_paths(get_state(model), adapters)}


def chains(model: nn.Module, name: str) -> dict[Site, Chain]:
    """The branches of one adapter by site; also while merged, and where an owner is gone from the model."""
    state = get_state(model)
    found: dict[Site, Chain] = {}
    for path in dict.fromkeys(e.site.owner for e in state.adapters[name].entries):
        held = state.containers[path].branches(name)
        found.update({site: branch for site, branch, _ in held if isinstance(branch, Chain)})
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
    """Raise `AdapterError` inside of a context that the user entered."""
    state = find_state(model)
    open_ = [context.name for context in state.contexts if context.name] if state is not None else []
    if open_:
        raise AdapterError(
            f"Cannot {action} inside of `with {open_[-1]}(...)`, which puts back what it found. Leave it first."
        )


def strengths(active: Mapping[str, float] | tuple[str, ...] | list[str]) -> dict[str, float]:
    """Adapters with their strengths, which are 1 where none is said."""
    return dict(active) if isinstance(active, Mapping) else dict.fromkeys(active, 1.0)
