"""One file per method, found by its file name; other packages add methods by the entry point `graphpeft.methods`.

A method is registered when its class is created (see `Method`). So importing every module in this folder registers all
of graphpeft's own methods. Those of a package are registered when its entry point is loaded, at the first lookup that
needs it.
"""

import pkgutil
from importlib import import_module

from graphpeft.methods import base
from graphpeft.methods.base import Method, NotNegative, Option, Positive, Probability, Rank, Where, get, names, options

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


def builtin() -> tuple[type[Method], ...]:
    """The methods that come with graphpeft, by name."""
    found = (base.get(name) for name in base.names())
    return tuple(method for method in found if method.__module__.startswith(f"{__name__}."))


def __getattr__(name: str) -> type[Method]:
    """The method classes by their own names, as in `graphpeft.methods.LoRA`."""
    found = next((method for method in builtin() if method.__name__ == name), None)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found


__all__ = [
    "Method", "NotNegative", "Option", "Positive", "Probability", "Rank", "Where", "builtin", "get", "names", "options",
]  # fmt: skip
