"""Activate and disable adapters. Each owner's graph is rebuilt from its base graph, so no edit is applied twice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from graphpeft.ambient import plain
from graphpeft.errors import AdapterError
from graphpeft.rewrite.entry import entered, on_model
from graphpeft.rewrite.state import get_state, names, refuse_merged
from graphpeft.rewrite.sync import opened, set_active
from graphpeft.tracing import as_pass


@as_pass("activate", "rewrite owners so that the chosen adapters run")
@plain()
@on_model()
def activate(model: nn.Module, name: str | Sequence[str] | Mapping[str, float] | None) -> None:
    """Choose the adapters that run and train: one, several (their updates add up), or none (`None`).

    A mapping gives each adapter a strength, a factor on its update ΔW while it is active, merged or exported; for DoRA
    it multiplies B A, as PEFT's scale does. The default is 1, and `save` does not store it. Raises `AdapterError` for an
    unknown name, a strength that is not finite, or a merged model.
    """
    refuse_merged(model, "activate")
    get_state(model)
    chosen = names(model, name if isinstance(name, str) else tuple(name)) if name is not None else ()
    strengths = {each: float(name[each]) if isinstance(name, Mapping) else 1.0 for each in chosen}
    if wrong := [each for each, strength in strengths.items() if not math.isfinite(strength)]:
        raise AdapterError(f"The strength of {wrong[0]!r} is {strengths[wrong[0]]}; it has to be a finite number.")
    get_state(model).applied = {}  # what somebody set on the tensors meanwhile does not count
    set_active(model, strengths)


@contextmanager
def reference(model: nn.Module, of: str = "base") -> Iterator[None]:
    """A context for reference passes, as of DPO, distillation or a penalty on outputs: the model computes as its base, or as the
    adapter `of` alone, without gradients. At the end the same adapters run and train as before.

    Raises `AdapterError` for an unknown adapter, or a merged model.
    """
    model = entered(model, "make a reference pass")
    if not get_state(model).contexts:
        refuse_merged(model, "make a reference pass")
    chosen = () if of == "base" else names(model, of)
    with opened(model, "gp.reference", chosen), torch.no_grad():
        yield


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the model is its base, bit for bit. Raises `AdapterError` if it is merged or not adapted."""
    model = entered(model, "disable adapters")
    if not get_state(model).contexts:  # contexts may be nested
        refuse_merged(model, "disable adapters")
    with opened(model, "gp.disabled", ()):
        yield
