"""Activate, disable and remove adapters. Owners are lowered anew from their base graphs; nothing is edited twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from graphpeft.adapters import home
from graphpeft.owner import STATE, vacate
from graphpeft.passes.merge import unmerge
from graphpeft.program import stored
from graphpeft.state import get_state, inactive, names, owners, refuse_merged, set_active
from graphpeft.steps import named


@named("activate")
def activate(model: nn.Module, name: str | Sequence[str] | None) -> None:
    """Make one adapter, several (their updates add up), or, with `None`, none run and train.

    Raises `AdapterError` for an unknown name or a merged model.
    """
    refuse_merged(model, "activate")
    get_state(model)
    set_active(model, names(model, name if isinstance(name, str) else tuple(name)) if name is not None else ())


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the model is its base, to the bit. Raises `AdapterError` if it is merged or not adapted."""
    get_state(model)
    refuse_merged(model, "disable adapters")
    with inactive(model):
        yield


@named("remove")
def remove(model: nn.Module, name: str | None = None) -> None:
    """Take an adapter off for good (all of them without a name), after un-merging if it is merged.

    With the last one the model is the base to the bit: classes, weights, parameter names and `requires_grad`.
    """
    state = get_state(model)
    leaving = names(model, name)
    if state.merged:
        unmerge(model)
    set_active(model, tuple(n for n in state.active if n not in leaving))
    for module in owners(model, leaving).values():
        adapters = home(module)
        assert adapters is not None
        for gone in leaving:
            if gone in adapters.sites:
                adapters.drop(gone)
        if not adapters.sites:
            vacate(module)
    for gone in leaving:
        del state.adapters[gone]
    if not state.adapters:
        for path, required in state.required.items():
            stored(model, path).requires_grad_(required)
        del model.__dict__[STATE]
