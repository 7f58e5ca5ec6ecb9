"""graphpeft: adapters for PyTorch models, inserted the way a compiler would.

The public names are those of `__init__.pyi`, which type checkers read and from which each is imported when it is first used:
help and completion on the command line do not wait for torch. No module beside this file is called as a public name is, for
importing it would put the module in the name's place; so `gp.plan` comes from `planning`, and `gp.apply` from `applying`.
"""

import threading
from typing import Any

import lazy_loader

__version__ = "0.1.0"
"""The one place where the version stands; pyproject.toml and the files that graphpeft writes take it from here."""

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
_loading = threading.RLock()


def __getattr__(name: str) -> Any:
    """Import one thing at a time: threads that import siblings of one package at once can lock each other out."""
    with _loading:
        return _load(name)
