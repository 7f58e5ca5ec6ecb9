"""Activate, disable and remove adapters. Owners are lowered anew from their base graphs; nothing is edited twice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from graphpeft.errors import AdapterError
from graphpeft.rewrite.state import (
    chains,
    get_state,
    inactive,
    inside,
    names,
    refuse_merged,
    set_active,
)
from graphpeft.tracing import as_pass


@as_pass("activate", "rewrite the owners' graphs with the branches")
def activate(model: nn.Module, name: str | Sequence[str] | Mapping[str, float] | None) -> None:
    """Make one adapter, several (their updates add up), or, with `None`, none run and train.

    A mapping gives each a strength, which its update ΔW is multiplied by while it is active, merged or exported, and which
    its file does not hold; of DoRA it multiplies B A, as PEFT's scale does. Without one it is 1. Raises `AdapterError` for
    an unknown name, a strength that is not finite, or a merged model.
    """
    refuse_merged(model, "activate")
    get_state(model)
    chosen = names(model, name if isinstance(name, str) else tuple(name)) if name is not None else ()
    strengths = {each: float(name[each]) if isinstance(name, Mapping) else 1.0 for each in chosen}
    if wrong := [each for each, strength in strengths.items() if not math.isfinite(strength)]:
        raise AdapterError(f"The strength of {wrong[0]!r} is {strengths[wrong[0]]}; it has to be a finite number.")
    changed = [each for each in chosen if _strengthen(model, each, strengths[each])]
    if changed:  # the graphs of owners hold strengths as numbers
        set_active(model, tuple(each for each in get_state(model).active if each not in changed))
    set_active(model, chosen)


def _strengthen(model: nn.Module, name: str, strength: float) -> bool:
    """Give the branches of an adapter a strength; whether that changes any."""
    branches = chains(model, name).values()
    changed = any(chain.strength != strength for chain in branches)
    for chain in branches:
        chain.strength = strength
    return changed


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the model is its base, to the bit. Raises `AdapterError` if it is merged or not adapted."""
    if not get_state(model).inside:  # contexts may stand in each other
        refuse_merged(model, "disable adapters")
    with inside(model, "gp.disabled"), inactive(model):
        yield
