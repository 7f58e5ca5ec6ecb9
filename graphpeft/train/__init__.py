"""Training tools: noise, loss penalties, events, and parameter groups."""

from typing import TYPE_CHECKING, Any

from graphpeft.train.events import at, every, fire, since
from graphpeft.train.groups import parameter_groups
from graphpeft.train.moments import estimate_K, perturbed_losses
from graphpeft.train.pac import PAC
from graphpeft.train.penalty import add_penalties, penalty

if TYPE_CHECKING:
    from graphpeft.train.trainer import AdapterCallback

__all__ = [
    "PAC",
    "AdapterCallback",
    "add_penalties",
    "at",
    "estimate_K",
    "every",
    "fire",
    "parameter_groups",
    "penalty",
    "perturbed_losses",
    "since",
]


def __getattr__(name: str) -> Any:
    if name == "AdapterCallback":  # Trainer takes longer to import than all of graphpeft
        from graphpeft.train.trainer import AdapterCallback

        return AdapterCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
