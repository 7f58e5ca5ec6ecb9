"""graphpeft: adapters for PyTorch models, inserted the way a compiler would. The public names, and nothing else.

A name is imported when it is first used, so that help and completion on the command line do not wait for torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphpeft.apply import apply as apply
    from graphpeft.apply import plan as plan
    from graphpeft.apply import sites as sites
    from graphpeft.apply import trainable as trainable
    from graphpeft.capture.capture import capture as capture
    from graphpeft.inspect.bops import bops as bops
    from graphpeft.inspect.diff import diff as diff
    from graphpeft.inspect.explain import explain as explain
    from graphpeft.inspect.network import to_networkx as to_networkx
    from graphpeft.inspect.report.write import report as report
    from graphpeft.inspect.watch import watch as watch
    from graphpeft.inspect.why import why as why
    from graphpeft.passes.activate import activate as activate
    from graphpeft.passes.activate import disabled as disabled
    from graphpeft.passes.activate import remove as remove
    from graphpeft.passes.combine import combine as combine
    from graphpeft.passes.compact import compact as compact
    from graphpeft.passes.export import export as export
    from graphpeft.passes.lower import lower as lower
    from graphpeft.passes.merge import merge as merge
    from graphpeft.passes.merge import unmerge as unmerge
    from graphpeft.passes.merge_files import merge_files as merge_files
    from graphpeft.passes.per_row import per_row as per_row
    from graphpeft.passes.rename import rename as rename
    from graphpeft.passes.storage import load as load
    from graphpeft.passes.storage import push_to_hub as push_to_hub
    from graphpeft.passes.storage import save as save
    from graphpeft.passes.swap import swap as swap
    from graphpeft.passes.verify import verify as verify
    from graphpeft.runtime.session import Session as Session
    from graphpeft.train.groups import parameter_groups as parameter_groups
    from graphpeft.train.pac import PAC as PAC
    from graphpeft.train.penalty import add_penalties as add_penalties
    from graphpeft.train.penalty import penalty as penalty
    from graphpeft.train.trainer import AdapterCallback as AdapterCallback

__version__ = "0.1.0"

HOMES = {
    "PAC": "train.pac",
    "AdapterCallback": "train.trainer",
    "Session": "runtime.session",
    "activate": "passes.activate",
    "add_penalties": "train.penalty",
    "apply": "apply",
    "bops": "inspect.bops",
    "capture": "capture.capture",
    "combine": "passes.combine",
    "rename": "passes.rename",
    "compact": "passes.compact",
    "diff": "inspect.diff",
    "disabled": "passes.activate",
    "explain": "inspect.explain",
    "export": "passes.export",
    "load": "passes.storage",
    "lower": "passes.lower",
    "merge": "passes.merge",
    "merge_files": "passes.merge_files",
    "parameter_groups": "train.groups",
    "penalty": "train.penalty",
    "per_row": "passes.per_row",
    "plan": "apply",
    "push_to_hub": "passes.storage",
    "remove": "passes.activate",
    "report": "inspect.report.write",
    "save": "passes.storage",
    "sites": "apply",
    "swap": "passes.swap",
    "to_networkx": "inspect.network",
    "trainable": "apply",
    "unmerge": "passes.merge",
    "verify": "passes.verify",
    "watch": "inspect.watch",
    "why": "inspect.why",
}
"""Where each name comes from."""
__all__ = [*HOMES]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES})


class _Package(ModuleType):
    """`gp.apply` stays the function, though it lives in a module of that name, which an import would put there."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
