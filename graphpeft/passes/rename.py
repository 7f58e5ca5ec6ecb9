"""Rename an adapter, on the model and in every owner."""

from __future__ import annotations

from torch import nn

from graphpeft.ambient import plain
from graphpeft.rewrite.entry import on_model
from graphpeft.rewrite.naming import check_name
from graphpeft.rewrite.state import AdapterSet, names, refuse_merged
from graphpeft.rewrite.sync import finish
from graphpeft.tracing import as_pass


@as_pass("rename", "rename an adapter")
@plain()
@on_model(intact=False)
def rename(model: nn.Module, old: str, new: str) -> nn.Module:
    """Rename an adapter; returns the model. Its tensors stay the same objects, so an optimizer remains valid.

    Raises `AdapterError`, and changes nothing, for an unknown name, a new name that is taken or invalid, or a merged model.
    """
    refuse_merged(model, "rename an adapter")
    names(model, old)
    check_name(model, new)

    def work(_: nn.Module, state: AdapterSet) -> None:
        state.__dict__.update(
            adapters={new if name == old else name: adapter for name, adapter in state.adapters.items()},
            active={new if name == old else name: strength for name, strength in state.active.items()},
        )
        for adapters in state.containers.values():
            adapters.rename(old, new)

    finish(model, work)
    return model
