"""graphpeft: adapters for PyTorch models, inserted the way a compiler would. The public names, and nothing else."""

from graphpeft.apply import apply, plan, sites, trainable
from graphpeft.capture import capture
from graphpeft.inspect.bops import bops
from graphpeft.inspect.diff import diff
from graphpeft.inspect.explain import explain
from graphpeft.passes.activate import activate, disabled, remove
from graphpeft.passes.compact import compact
from graphpeft.passes.export import export
from graphpeft.passes.lower import lower
from graphpeft.passes.merge import merge, unmerge
from graphpeft.passes.storage import load, save
from graphpeft.passes.verify import verify
from graphpeft.runtime import Session
from graphpeft.train import PAC, add_penalties, parameter_groups, penalty

__version__ = "0.1.0"

__all__ = [
    "PAC",
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
    "trainable",
    "unmerge",
    "verify",
]
