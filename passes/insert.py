"""Insert: the only pass that adds parameters. Puts a planned adapter on its owners; all of it or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graphpeft.adapters import Adapters, home, places, settle
from graphpeft.chain import Chain, Factor, Transform
from graphpeft.errors import AdapterError
from graphpeft.hooked import device_of
from graphpeft.names import is_name
from graphpeft.owner import STATE, vacate
from graphpeft.plan import Entry
from graphpeft.program import stored
from graphpeft.quantized import hold_order, library
from graphpeft.sharded import refuse_sharded
from graphpeft.state import Adapter, State, find_state, refuse_merged
from graphpeft.steps import named


def usable(name: str) -> bool:
    """Whether an adapter can have this name: it stands among the attributes of modules."""
    return is_name(name) and not hasattr(nn.ModuleDict, name) and not hasattr(Adapters(), name)


def check_name(model: nn.Module, name: str) -> None:
    """Raise `AdapterError` unless `name` is free on the model and fit for a module's name, and the model not merged."""
    if not usable(name):
        raise AdapterError(
            f"{name[:80]!r} cannot name an adapter: names become part of parameter names. Use letters, digits and underscores, "
            f"as in 'default' or 'task_1', no keyword of Python, and no name that torch.nn.Module or graphpeft's own uses."
        )
    state = find_state(model)
    if state is not None and name in state.adapters:
        raise AdapterError(
            f"{type(model).__name__} already has an adapter {name!r}, made by `{state.adapters[name].rules}`. Usually apply "
            f"ran twice. Pass name= for a second adapter, or call gp.remove(model, {name!r}) first."
        )
    refuse_merged(model, "add an adapter")
    refuse_sharded(
        model, "add an adapter", "Call gp.apply or gp.load first, and fully_shard or accelerator.prepare after it."
    )


@named("insert")
def insert(model: nn.Module, name: str, rules: str, seed: int, entries: tuple[Entry, ...]) -> State:
    """Attach empty branches, freeze the base, and record the adapter. The adapter is not yet active."""
    check_name(model, name)
    shared: dict[str, Any] = {}
    touched: list[nn.Module] = []
    try:
        for entry in entries:
            branch = _branch(model, entry, shared)
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
        ours = {p for name_ in (name,) for o in touched for p in home_parameters(o, name_)}
        required = {n: p.requires_grad for n, p in model.named_parameters() if p not in ours}
        state = State(required=required, held=hold_order(model))
        model.__dict__[STATE] = state
        require(model, dict.fromkeys(required, False))
    state.adapters[name] = Adapter(rules, seed, entries)
    return state


def require(model: nn.Module, required: Mapping[str, bool]) -> None:
    """Let parameters train, or freeze them, but for those that are gone, as a head that was replaced. Those made in inference
    mode never train, and torch forbids to say that they do."""
    held = dict(model.named_parameters(remove_duplicate=False))
    for name, trained in required.items():
        if name in held and not held[name].is_inference():
            held[name].requires_grad_(trained)


def _check(model: nn.Module, entry: Entry) -> None:
    """The places of a site hold one tensor, in one orientation; a stack takes the weight form."""
    site = entry.site
    if site.stack and site.form != "weight":
        raise AdapterError(
            f"{site.weight} is a stack of {site.stack} matrices, which a side path cannot serve. Sites come from "
            f"gp.sites(model); there this one has the form 'weight'."
        )
    for place in site.tied:
        if stored(model, place.weight) is not stored(model, site.weight):
            raise AdapterError(
                f"{place.weight} and {site.weight} are planned as one tied weight, and are two tensors now. Usually the "
                f"model was untied in between, as by assigning to one of them. Plan again: gp.apply(model, rules)."
            )
        if place.transposed != site.transposed:
            raise AdapterError(
                f"{place.weight} and {site.weight} are one tensor, read as (out, in) by one module and as (in, out) by "
                f"the other, so no single update serves both. Untie them, or choose other sites."
            )


def home_parameters(owner: nn.Module, name: str) -> list[nn.Parameter]:
    adapters = home(owner)
    return [p for _, branch, _ in adapters.branches(name) for p in branch.parameters()] if adapters else []


def _withdraw(owner: nn.Module, name: str) -> None:
    adapters = home(owner)
    if adapters is not None and name in adapters.sites:
        adapters.drop(name)
    if adapters is not None and not adapters.sites:
        vacate(owner)


def _branch(model: nn.Module, entry: Entry, shared: dict[str, Any]) -> Chain:
    """An empty branch on the weight's device, in float32 where the base is in half precision or packed integers."""
    weight = stored(model, entry.site.weight)
    _check(model, entry)
    wide = weight.dtype in (torch.float32, torch.float64)
    with torch.device(device_of(model.get_submodule(entry.site.weight.rpartition(".")[0]), weight)):
        chain = entry.build().to(weight.dtype if wide else torch.float32)
    known = library(weight)
    if known and (entry.site.form == "weight" or not chain.beside):
        raise AdapterError(
            f"{entry.site.weight} ({entry.site.role}) is quantized by {known}, and `{entry.rule}` needs weight + ΔW in floats on "
            f"every call there. Choose a method that runs beside the weight, such as lora, or load the base in floats."
        )
    for place in places(entry.site):
        if chain.before is not None and (place.form == "weight" or place.rows or place.role == "embed" or place.stack):
            raise AdapterError(
                f"{place.weight} ({place.role}) cannot have its input rounded: its module reads the input inside a fused "
                f"operator or shares it with other rows, or it picks rows by index. Use a rule of its own without that."
            )
        if place.form == "weight" and chain.probability:
            raise AdapterError(
                f"{place.weight} takes the weight form, because its module reads the weight inside a fused operator, "
                f"and dropout on the input cannot be expressed there. Use dropout=0 for `{entry.rule}`."
            )
        if place.role == "embed" and chain.probability:
            raise AdapterError(
                f"{place.weight} is an embedding table, whose input are indices: dropout has no features to act on. "
                f"Use dropout=0 for `{entry.rule}`."
            )
    for i, factor in enumerate(chain.factors):
        assert isinstance(factor, Factor)
        chain.factors[i] = factor.joined(shared)
    for module in chain.modules():
        if isinstance(module, Transform):
            module.join(shared)
    return chain
