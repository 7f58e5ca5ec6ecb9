"""Remove: take adapters off the model for good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from graphpeft.compat.quantized import release_order
from graphpeft.passes.merge import unmerge
from graphpeft.rewrite.adapters import home
from graphpeft.rewrite.freezing import require
from graphpeft.rewrite.owner import STATE, vacate
from graphpeft.rewrite.state import (
    find_state,
    get_state,
    names,
    owners,
    refuse_inside,
    set_active,
)
from graphpeft.tracing import as_pass


@contextmanager
def undone_on_error(model: nn.Module, name: str) -> Iterator[None]:
    """On an error inside, remove the adapter `name` if it was added there, and reactivate the previous adapters."""
    state = find_state(model)
    before, known = (state.active, name in state.adapters) if state is not None else ((), False)
    try:
        yield
    except BaseException:
        if not known and (state := find_state(model)) is not None and name in state.adapters:
            remove(model, name)
        if before:
            set_active(model, before)
        raise


@as_pass("remove", "remove adapters")
def remove(model: nn.Module, name: str | None = None) -> None:
    """Remove an adapter (without `name`, all of them) for good; a merged model is un-merged first.

    Removing the last one restores the base bit for bit: classes, weights, parameter names and `requires_grad`.
    """
    state = get_state(model)
    refuse_inside(model, "remove an adapter")
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
        require(model, state.required)
        release_order(model, state.held)
        del model.__dict__[STATE]
