"""The way in: what every public function does first with the model that it is given."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

from torch import nn
from torch.export import ExportedProgram

from graphpeft.compat.wrappers import inner, is_peft
from graphpeft.errors import AdapterError
from graphpeft.rewrite.reality import changed
from graphpeft.rewrite.state import find_state
from graphpeft.rewrite.sync import recover
from graphpeft.tracing import depth

P = ParamSpec("P")
R = TypeVar("R")


def on_model(adds: bool = False, intact: bool = True) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of a function whose first argument is a model: see `entered`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        action = function.__name__.replace("_", " ")

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if args:
                given = (entered(args[0], action, adds, intact), *args[1:])
                return cast(Any, function)(*given, **kwargs)
            if "model" in kwargs:
                kwargs["model"] = entered(kwargs["model"], action, adds, intact)
            return function(*args, **kwargs)

        return call

    return decorate


def entered(model: Any, action: str, adds: bool = False, intact: bool = True) -> Any:
    """The model that a public function works on: the one inside a wrapper, with what an interrupt left done or undone.

    Args:
        action: what the function does, for messages.
        adds: whether it adds parameters, which a wrapper would not know.
        intact: whether every owner has to be what its adapters were made for.

    Raises `AdapterError` for what is no model, a wrapper that cannot stay, a model of PEFT's, or one that other code changed.
    """
    if isinstance(model, ExportedProgram):
        return model
    if not isinstance(model, nn.Module):
        raise AdapterError(
            f"Cannot {action}: expected a torch.nn.Module, got {type(model).__name__} {str(model)[:60]!r}. Build or load the "
            f"model first, for example with transformers' from_pretrained."
        )
    if is_peft(model):
        raise AdapterError(
            f"Cannot {action}: this is a {type(model).__name__} of PEFT, whose adapters graphpeft does not see. Save them with "
            f"save_pretrained, and call gp.load(base_model, folder) on the model without PEFT."
        )
    root = model
    while (found := inner(root)) is not None:
        root = found
    if root is not model and adds:
        raise AdapterError(
            f"Cannot {action}: {type(model).__name__} wraps the model, and was made for the parameters that it found. Adapt the "
            f"{type(root).__name__} first, and wrap it afterwards."
        )
    recover(root)
    state = find_state(root)
    if state is not None and intact and depth() <= 1:
        changed(root, state, action)
    return root
