"""Insert: the only pass that adds parameters. Attaches a planned adapter to its owners, completely or not at all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from graphpeft.compat.quantized import hold_order
from graphpeft.errors import AdapterError
from graphpeft.planning.plan import Entry
from graphpeft.rewrite.adapters import Adapters, container, hold, places
from graphpeft.rewrite.branch import at_holder, make_branch
from graphpeft.rewrite.freezing import require
from graphpeft.rewrite.naming import check_name
from graphpeft.rewrite.state import Adapter, AdapterSet, find_state
from graphpeft.rewrite.sync import begin, changing
from graphpeft.tracing import as_pass


@as_pass("insert", "attach empty branches to the owners")
def insert(
    model: nn.Module, name: str, rules: str, seed: int, entries: tuple[Entry, ...], inputs: Any = None
) -> AdapterSet:
    """Attach empty branches, freeze the base, and record the adapter. The adapter is not yet active.

    `inputs` is an example call; views that capture the model again reuse it.
    """
    check_name(model, name)
    shared: dict[str, Any] = {}
    entries = tuple(replace(entry, site=at_holder(model, entry.site)) for entry in entries)
    branches = [(entry, make_branch(model, entry, shared)) for entry in entries]
    begin(model)
    with changing(model) as state:
        if not state.adapters:
            state.reorder_disabled = hold_order(model)
            require(model, dict.fromkeys(state.base_requires_grad, False))
        for entry, branch in branches:
            for place in places(entry.site):
                owner = model.get_submodule(place.owner)
                adapters = container(owner, place.owner)
                if adapters.sites and state.containers.get(place.owner) is not adapters:
                    raise AdapterError(_of_another(model, place.owner, adapters))
                state.containers[place.owner] = adapters  # known before it is in the module tree, to be found again
                hold(owner, adapters)
                adapters.add(name, place, branch, guest=place is not entry.site)
                adapters.opaque |= not place.calls or place.reader is not None
                adapters.train(owner.training)
        fresh = Adapter(rules, seed, entries)
        state.__dict__.update(
            adapters={**state.adapters, name: fresh}, inputs=state.inputs if inputs is None else inputs
        )
    return state


def _of_another(model: nn.Module, path: str, adapters: Adapters) -> str:
    """What to say of an owner that has adapters of another root."""
    inside = [name for name, module in model.named_modules() if name and find_state(module) is not None]
    whose = f"its submodule {inside[0]}" if inside else "a model around this one"
    return (
        f"{path or 'The model'} already has the adapter {next(iter(adapters.sites))!r}, which was added to {whose}: one module "
        f"takes the adapters of one root alone. Call gp.apply on that model, or gp.remove its adapters first."
    )
