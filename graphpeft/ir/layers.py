"""The number of the repeated block that a weight or a module is in: the first number between the dots of its path.

The last component of a weight's name is the parameter itself, so it is no layer's number: `ws.0` in a ParameterList has none.
"""

from __future__ import annotations

import re

_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")


def layer_of(weight: str) -> int | None:
    """`model.layers.3.mlp.weight` is in layer 3, `2.weight` in layer 2; `None` outside of numbered blocks."""
    found = _NUMBER.search(weight)
    return int(found[1]) if found else None


def layer_of_module(path: str) -> int | None:
    """The same for the path of a module, whose last component counts: `layers.3`."""
    return layer_of(f"{path}.")


def block_of(path: str) -> str:
    """The path of the block that a module is in, its number as `*`: `model.layers.*`; empty outside of blocks."""
    found = _NUMBER.search(f"{path}.")
    return f"{path[: found.start(1)]}*" if found else ""


def any_layer(weight: str) -> str:
    """A weight's name with its layer's number as `*`, which `path(...)` reads as any layer.

    A number at the beginning stays: `path(*.weight)` would mean every weight there is.
    """
    return re.sub(r"\.\d+\.", ".*.", weight, count=1)


def any_layer_of_module(path: str) -> str:
    """The same for the path of a module."""
    return any_layer(f"{path}.").removesuffix(".")
