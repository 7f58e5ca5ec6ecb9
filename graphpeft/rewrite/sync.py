"""Sync: let the modules run what the record says.

The record (`AdapterSet`) is written first and the modules follow, so the record is its own journal: whatever interrupts the
work, the next call finds `pending` set and does what is left. Every step can be repeated without harm.

An exception of ours, as when an owner's code has no use of a weight, puts the record back as it was before. An interrupt, such as
Ctrl-C, lets the work be finished at once, and if it is interrupted again, by the next public call or forward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from graphpeft.ambient import one_at_a_time
from graphpeft.compat.graph_modules import carry
from graphpeft.compat.hooks import has_pre_hook, remove_pre_hook, remove_state_hooks
from graphpeft.compat.quantized import release_order
from graphpeft.compat.sharded import reshard
from graphpeft.errors import AdapterError
from graphpeft.ir.weights import get_parameter
from graphpeft.rewrite import late
from graphpeft.rewrite.adapters import Adapters, Held, home
from graphpeft.rewrite.freezing import require
from graphpeft.rewrite.numbers import compare, describe
from graphpeft.rewrite.owner import attach, detach, install, refuse_replaced
from graphpeft.rewrite.reality import changed, located, same, watched
from graphpeft.rewrite.rows import Assignment, Rows
from graphpeft.rewrite.state import STATE, AdapterSet, Context, find_state, get_state, strengths
from graphpeft.rewrite.threads import refuse_running
from graphpeft.tracing import depth

Active = Mapping[str, float] | tuple[str, ...] | list[str]


def sync(model: nn.Module, switch: bool = False) -> None:
    """Compare what each owner should run with what it runs, and rebuild what differs.

    With `switch` only the choice of adapters has changed, so that branches are not looked into.
    """
    state = find_state(model)
    if state is None:
        return
    thorough = not switch or bool(state.journal)
    state.pending = True
    for work in state.journal:
        work(model, state)
    state.journal = ()
    if state.merge is not None and not state.merge.complete:
        _put_back(model, state)
    owners = located(model, state)
    if thorough or not state.attached or any(adapters.detached for adapters in state.containers.values()):
        _contain(owners, state)
    for path, adapters in state.containers.items():
        owner = owners[path]
        if owner is not None and home(owner) is adapters:
            _run(owner, path, adapters, state, thorough)
    _values(model, state, thorough)
    if not state.adapters:
        _forget(model, state)
    else:
        state.watched = watched(model, state, owners)
        if isinstance(model, fx.GraphModule):
            carry(model, STATE, wanted=state.merge is not None)
        if not has_pre_hook(model, before_forward):
            model.register_forward_pre_hook(before_forward)
            model.register_state_dict_post_hook(describe)
            model.register_load_state_dict_pre_hook(compare)
    state.pending = False


def _put_back(model: nn.Module, state: AdapterSet) -> None:
    """The weights as they were before a merge that is not complete, or that is undone."""
    merge = state.merge
    assert merge is not None
    reshard(model)
    for path, original in merge.originals.items():
        try:
            weight = get_parameter(model, path).data
        except AdapterError:  # its module was replaced
            continue
        if weight.shape == original.shape:
            weight.copy_(original)
    state.__dict__.update(merge=None, attached=True)


def _contain(owners: Mapping[str, nn.Module | None], state: AdapterSet) -> None:
    """Put the containers on the module tree or take them off, and drop what the record does not know."""
    for path, adapters in list(state.containers.items()):
        for name in [name for name in adapters.sites if name not in state.adapters]:
            adapters.drop(name)
        for name in [name for name in adapters._modules if name not in adapters.sites and name != "by_row"]:
            del adapters._modules[name]  # an interrupt between two lines of `add`
        owner = owners[path]
        there = owner is not None and home(owner) is adapters
        if not adapters.sites:
            if owner is not None and there:
                detach(owner)
            del state.containers[path]
        elif owner is not None and there and not state.attached and not _keeps(owner, state):
            detach(owner, keep_mode=state.merge is not None)
        elif owner is not None and not there and state.attached and adapters.detached and adapters.fits(owner):
            attach(owner, adapters)


def _keeps(owner: nn.Module, state: AdapterSet) -> bool:
    """Whether a container stays while the base is captured: a graph module is read through its base graph."""
    return state.merge is None and isinstance(owner, fx.GraphModule)


def _run(owner: nn.Module, path: str, adapters: Adapters, state: AdapterSet, thorough: bool) -> None:
    active = tuple([name for name in state.active if name in adapters.sites])
    if active != adapters.active:
        adapters.__dict__["active"] = active  # as `nn.Module.__setattr__` does, after a look at what it is
    rows = state.rows if state.rows is not None and adapters.active else None
    if rows is None and adapters.by_row is not None:
        del adapters.by_row  # a submodule: assigning None would leave its name among the submodules
        adapters.by_row = None
    elif rows is not None and (adapters.by_row is None or adapters.by_row.assignment is not rows):
        adapters.by_row = Rows(path, rows)
    install(owner, thorough)


def _values(model: nn.Module, state: AdapterSet, thorough: bool) -> None:
    """Strengths, and which tensors train."""
    wanted = {name: (name in state.active, state.active.get(name, 1.0)) for name in state.adapters}
    differ = {name for name, each in wanted.items() if thorough or state.applied.get(name) != each}
    for adapters in state.containers.values() if differ else ():
        for name in adapters.sites:
            if name in differ:
                on, strength = wanted[name]
                switched = thorough or state.applied.get(name, (not on, 0))[0] is not on
                _set(state, adapters.trained(name, thorough), on if switched else None, strength)
    if differ or state.switched_rows is not state.rows:
        state.switches += 1
    state.applied, state.switched_rows = wanted, state.rows
    for adapter in state.adapters.values():
        if adapter.objective is not None and adapter.objective.frozen:
            adapter.objective.freeze(model)


def _set(state: AdapterSet, branches: Iterable[Held], on: bool | None, strength: float) -> None:
    for branch, held in branches:
        if branch.__dict__.get("strength", strength) != strength:
            branch.strength = strength  # type: ignore[assignment]
        for parameters, leaf in held if on is not None else ():
            parameter = parameters.get(leaf)
            if parameter is not None and parameter.requires_grad is not on:
                if not on:
                    late.watch(parameter, state)
                parameter.requires_grad_(on)


def _forget(model: nn.Module, state: AdapterSet) -> None:
    """The last adapter is gone: what the first one changed of the base goes back."""
    require(model, state.base_requires_grad)
    release_order(model, state.reorder_disabled)
    remove_pre_hook(model, before_forward)
    remove_state_hooks(model, describe, compare)
    if isinstance(model, fx.GraphModule):
        carry(model, STATE, wanted=False)
    del model.__dict__[STATE]


def begin(model: nn.Module) -> AdapterSet:
    """The model's record, made empty on first use. Until it has an adapter, the next `sync` takes it off again."""
    state = find_state(model)
    if state is None:
        held = model.named_parameters(remove_duplicate=False)  # tied ones may be untied later
        required = {name: parameter.requires_grad for name, parameter in held}
        state = model.__dict__[STATE] = AdapterSet(base_requires_grad=required, pending=True)
    return state


@contextmanager
def changing(model: nn.Module, switch: bool = False) -> Iterator[AdapterSet]:
    """Change the record inside; at the end the modules run what it says. On an error all is as it was."""
    with one_at_a_time():
        state = get_state(model)
        _refuse_replaced(state)
        refuse_running(model)
        # Containers that were made stay known, so that `sync` takes them off again.
        before = {name: value for name, value in state.__dict__.items() if name not in ("pending", "containers")}
        state.pending = True
        try:
            yield state
            sync(model, switch)
        except Exception:
            state.__dict__.update(before, journal=())
            model.__dict__[STATE] = state
            sync(model)
            raise
        except BaseException:
            sync(model)
            raise


def set_active(model: nn.Module, active: Active) -> None:
    """Make exactly these adapters run and train."""
    with changing(model, switch=True) as state:
        state.__dict__.update(active=strengths(active), rows=None)


def before_forward(model: nn.Module, args: Any) -> None:
    """Hook of the root: finish what an interrupt left, and refuse a model that is no longer what the record says."""
    if torch.compiler.is_compiling():
        return
    state = model.__dict__.get(STATE)
    if state is None:
        return
    if state.pending or state.tentative is not None or state.contexts:
        with one_at_a_time():  # another thread may be at it
            recover(model, within=0)
    if torch.is_grad_enabled():
        state.ran = state.switches
    if not same(state):
        changed(model, state)
        state.watched = watched(model, state, located(model, state))


def _refuse_replaced(state: AdapterSet) -> None:
    for owner in {id(spot[0]): spot[0] for spot in state.spots.values()}.values():
        refuse_replaced(owner)


def recover(model: nn.Module, within: int = 1) -> None:
    """Finish or undo what an interrupt left. Inside of a pass that is at work, more than `within`, nothing is left yet."""
    state = find_state(model)
    if state is None or not (state.pending or state.tentative or state.contexts) or depth() > within:
        return
    dead = [context for context in state.contexts if context.alive() is None]
    if dead:
        first = dead[0]
        _close(state, first)
    if state.tentative is not None:
        undo_tentative(model, state)
    if state.pending:
        sync(model)


def undo_tentative(model: nn.Module, state: AdapterSet) -> None:
    """Take the adapter off that is being added, and activate what was active before."""
    assert state.tentative is not None
    name, before = state.tentative
    kept = {each: adapter for each, adapter in state.adapters.items() if each != name}
    active = {each: strength for each, strength in before.items() if each in kept}
    state.__dict__.update(adapters=kept, active=active, tentative=None, pending=True)
    sync(model)


def _tensors_of(state: AdapterSet, names: Iterable[str]) -> Iterator[nn.Parameter]:
    for adapters in state.containers.values():
        for name in names:
            for _, held in adapters.trained(name, anew=False) if name in adapters.sites else ():
                yield from (parameter for parameters, leaf in held if (parameter := parameters.get(leaf)) is not None)


class _Token:
    """Lives as long as the code of a context."""


@contextmanager
def opened(
    model: nn.Module,
    name: str,
    active: Active,
    rows: Assignment | None = None,
    attached: bool = True,
) -> Iterator[None]:
    """Within this context these adapters run; at its end what ran before. `name` is what the user entered."""
    state, token = get_state(model), _Token()
    frozen = [p for p in _tensors_of(state, state.active) if not p.requires_grad]  # somebody's choice, which stays
    context = Context(name, state.active, state.rows, state.attached, weakref.ref(token))
    try:
        with changing(model, switch=True) as state:
            state.__dict__.update(
                contexts=(*state.contexts, context), active=strengths(active), rows=rows, attached=attached
            )
        yield
    finally:
        if context in state.contexts:
            with changing(model, switch=True) as state:
                _close(state, context)
            for parameter in frozen:
                parameter.requires_grad_(False)


def _close(state: AdapterSet, context: Context) -> None:
    """Put back what a context changed, in one assignment that cannot be interrupted half-way."""
    left = state.contexts[: state.contexts.index(context)]
    state.__dict__.update(
        contexts=left, active=context.active, rows=context.rows, attached=context.attached, pending=True
    )


@contextmanager
def inactive(model: nn.Module, attached: bool = True) -> Iterator[None]:
    """The base model for a while, whichever adapters are active; with `attached` false, also without their modules.

    torch.export gives modules other paths as soon as one of them stands in two places, as what adapters share does.
    """
    state = find_state(model)
    if state is None or state.merged or (not state.active and attached):
        yield
        return
    with opened(model, "", {}, None, attached and state.attached):
        yield


def finish(model: nn.Module, *work: Callable[[nn.Module, AdapterSet], None]) -> None:
    """Do work that has to be finished once begun. Each part can be repeated without harm, and none may fail by itself."""
    with one_at_a_time():
        state = get_state(model)
        _refuse_replaced(state)
        refuse_running(model)
        state.__dict__.update(journal=work, pending=True)
        try:
            sync(model)
        except BaseException:
            sync(model)
            raise
