"""Remove: take adapters off for good."""

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
    """If anything inside fails, take the adapter `name` off that came meanwhile, and activate what was active before."""
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


@as_pass("remove", "branches off")
def remove(model: nn.Module, name: str | None = None) -> None:
    """Take an adapter off for good (all of them without a name), after un-merging if it is merged.

    With the last one the model is the base to the bit: classes, weights, parameter names and `requires_grad`.
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
