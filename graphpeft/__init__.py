"""graphpeft: adapters for PyTorch models, inserted the way a compiler would. The public names, and nothing else."""

from typing import TYPE_CHECKING, Any

from graphpeft.apply import apply, plan, sites, trainable
from graphpeft.capture import capture
from graphpeft.inspect.bops import bops
from graphpeft.inspect.diff import diff
from graphpeft.inspect.explain import explain
from graphpeft.inspect.network import to_networkx
from graphpeft.inspect.watch import watch
from graphpeft.inspect.why import why
from graphpeft.passes.activate import activate, disabled, remove
from graphpeft.passes.compact import compact
from graphpeft.passes.export import export
from graphpeft.passes.lower import lower
from graphpeft.passes.merge import merge, unmerge
from graphpeft.passes.storage import load, save
from graphpeft.passes.verify import verify
from graphpeft.runtime import Session
from graphpeft.train import PAC, add_penalties, parameter_groups, penalty

if TYPE_CHECKING:
    from graphpeft.train import AdapterCallback

__version__ = "0.1.0"

__all__ = [
    "PAC",
    "AdapterCallback",
    "Session",
    "activate",
    "add_penalties",
    "apply",
    "bops",
    "capture",
    "compact",
    "diff",
    "disabled",
    "explain",
    "export",
    "load",
    "lower",
    "merge",
    "parameter_groups",
    "penalty",
    "plan",
    "remove",
    "save",
    "sites",
    "to_networkx",
    "trainable",
    "unmerge",
    "verify",
    "watch",
    "why",
]


def __getattr__(name: str) -> Any:
    if name == "AdapterCallback":  # Trainer takes longer to import than all of graphpeft
        from graphpeft.train import AdapterCallback

        return AdapterCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
