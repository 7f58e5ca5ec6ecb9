"""Rename an adapter, on the model and in every owner."""

from __future__ import annotations

from torch import nn

from graphpeft.rewrite.adapters import home
from graphpeft.rewrite.naming import check_name
from graphpeft.rewrite.owner import relower
from graphpeft.rewrite.state import get_state, names, owners, refuse_merged
from graphpeft.tracing import as_pass


@as_pass("rename", "rename an adapter")
def rename(model: nn.Module, old: str, new: str) -> nn.Module:
    """Rename an adapter; returns the model. Its tensors stay the same objects, so an optimizer remains valid.

    Raises `AdapterError`, and changes nothing, for an unknown name, a new name that is taken or invalid, or a merged model.
    """
    refuse_merged(model, "rename an adapter")
    names(model, old)
    check_name(model, new)
    state = get_state(model)
    touched = owners(model, (old,))
    state.adapters = {new if name == old else name: adapter for name, adapter in state.adapters.items()}
    state.active = tuple(new if name == old else name for name in state.active)
    for owner in touched.values():
        adapters = home(owner)
        assert adapters is not None, "the adapter has sites there"
        adapters.rename(old, new)
        relower(owner)
    return model
