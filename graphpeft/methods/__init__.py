"""One file per method, found by its file; other packages add theirs by the entry point `graphpeft.methods`.

A method is known by name as soon as its class is made (see `Method`). So importing every module beside this one makes all of
graphpeft's own known, and those of a package become known when its entry point is loaded, at the first look at a name.
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
    """The classes by their own names, as in `graphpeft.methods.LoRA`."""
    found = next((method for method in builtin() if method.__name__ == name), None)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found


__all__ = [
    "Method", "NotNegative", "Option", "Positive", "Probability", "Rank", "Where", "builtin", "get", "names", "options",
]  # fmt: skip
