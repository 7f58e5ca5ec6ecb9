"""Which names adapters can have."""

from __future__ import annotations

from torch import nn

from graphpeft.compat.quantized import check_gradient_flow
from graphpeft.compat.sharded import refuse_sharded
from graphpeft.errors import AdapterError
from graphpeft.names import is_name
from graphpeft.rewrite.adapters import Adapters, home
from graphpeft.rewrite.state import find_state, refuse_merged


def usable(name: str) -> bool:
    """Whether an adapter can have this name, which becomes an attribute of modules."""
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
    _refuse_foreign(model)
    refuse_sharded(
        model, "add an adapter", "Call gp.apply or gp.load first, and fully_shard or accelerator.prepare after it."
    )


def _refuse_foreign(model: nn.Module) -> None:
    """Raise `AdapterError` if adapters of a model around this one are in it: they would be taken for a part of the base."""
    modules = list(model.modules())
    known = {id(held) for module in modules if (state := find_state(module)) for held in state.containers.values()}
    for path, module in model.named_modules():
        adapters = home(module)
        if adapters is not None and id(adapters) not in known:
            raise AdapterError(
                f"{path or type(model).__name__} has the adapter {next(iter(adapters.sites), '')!r} of a model around this "
                f"{type(model).__name__}. Call gp.apply on the model that was adapted, or gp.remove its adapters first."
            )


def check_adaptable(model: nn.Module, name: str) -> None:
    """Raise `AdapterError` if the model cannot take a trainable adapter of that name."""
    check_name(model, name)
    check_gradient_flow(model)
