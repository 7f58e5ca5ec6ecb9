"""Insert: the only pass that adds parameters. Attaches a planned adapter to its owners, completely or not at all."""

from __future__ import annotations

from typing import Any

from torch import nn

from graphpeft.compat.quantized import hold_order
from graphpeft.planning.plan import Entry
from graphpeft.rewrite.adapters import home, places, settle
from graphpeft.rewrite.branch import make_branch
from graphpeft.rewrite.freezing import require
from graphpeft.rewrite.naming import check_name
from graphpeft.rewrite.owner import STATE, vacate
from graphpeft.rewrite.state import Adapter, State, find_state
from graphpeft.tracing import as_pass


@as_pass("insert", "attach empty branches to the owners")
def insert(model: nn.Module, name: str, rules: str, seed: int, entries: tuple[Entry, ...], inputs: Any = None) -> State:
    """Attach empty branches, freeze the base, and record the adapter. The adapter is not yet active.

    `inputs` is an example call; views that capture the model again reuse it.
    """
    check_name(model, name)
    shared: dict[str, Any] = {}
    touched: list[nn.Module] = []
    try:
        for entry in entries:
            branch = make_branch(model, entry, shared)
            for place in places(entry.site):
                owner = model.get_submodule(place.owner)
                touched.append(owner)
                adapters = settle(owner, place.owner)
                adapters.add(name, place, branch, guest=place is not entry.site)
                adapters.train(owner.training)
    except BaseException:
        for owner in touched:
            _withdraw(owner, name)
        raise
    state = find_state(model)
    if state is None:
        ours = {p for name_ in (name,) for o in touched for p in _parameters(o, name_)}
        required = {n: p.requires_grad for n, p in model.named_parameters() if p not in ours}
        state = State(required=required, held=hold_order(model))
        model.__dict__[STATE] = state
        require(model, dict.fromkeys(required, False))
    state.adapters[name] = Adapter(rules, seed, entries)
    state.inputs = state.inputs if inputs is None else inputs
    return state


def _parameters(owner: nn.Module, name: str) -> list[nn.Parameter]:
    adapters = home(owner)
    return [p for _, branch, _ in adapters.branches(name) for p in branch.parameters()] if adapters else []


def _withdraw(owner: nn.Module, name: str) -> None:
    adapters = home(owner)
    if adapters is not None and name in adapters.sites:
        adapters.drop(name)
    if adapters is not None and not adapters.sites:
        vacate(owner)
