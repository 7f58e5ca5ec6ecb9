"""Remove: take adapters off the model for good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from graphpeft.ambient import plain
from graphpeft.passes.merge import unmerge
from graphpeft.rewrite.entry import on_model
from graphpeft.rewrite.state import get_state, names, refuse_inside
from graphpeft.rewrite.sync import begin, changing, undo_tentative
from graphpeft.tracing import as_pass


@contextmanager
def undone_on_error(model: nn.Module, name: str) -> Iterator[None]:
    """On an error inside, remove the adapter `name` if it was added there, and reactivate the previous adapters.

    If that is interrupted too, the next call does it: the record says which adapter is tentative.
    """
    state = begin(model)
    if name in state.adapters or state.tentative is not None:
        yield
        return
    try:
        state.tentative = name, dict(state.active)
        yield
        state.tentative = None
    except BaseException:
        if state.tentative is not None:
            undo_tentative(model, state)
        raise


@as_pass("remove", "remove adapters")
@plain()
@on_model(intact=False)
def remove(model: nn.Module, name: str | None = None) -> None:
    """Remove an adapter (without `name`, all of them) for good; a merged model is un-merged first.

    Removing the last one restores the base bit for bit: classes, weights, parameter names and `requires_grad`.
    """
    state = get_state(model)
    refuse_inside(model, "remove an adapter")
    leaving = names(model, name)
    if state.merged:
        unmerge(model)
    with changing(model) as state:
        state.__dict__.update(
            adapters={each: adapter for each, adapter in state.adapters.items() if each not in leaving},
            active={each: strength for each, strength in state.active.items() if each not in leaving},
        )
