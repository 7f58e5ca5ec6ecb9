"""The layer of a module or a weight: the first component of its path that is a number."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"(^|\.)(\d+)(?=\.|$)")


def layer_of(path: str) -> int | None:
    """`model.layers.3.mlp` is in layer 3, `2.weight` in layer 2; `None` outside of numbered blocks."""
    found = _NUMBER.search(path)
    return int(found[2]) if found else None


def block_of(path: str) -> str:
    """The path of the block with its number as `*`: `model.layers.*`; empty outside of blocks."""
    found = _NUMBER.search(path)
    return f"{path[: found.start()]}{found[1]}*" if found else ""


def any_layer(path: str) -> str:
    """The path with the layer's number as `*`, which `path(...)` reads as any layer."""
    return _NUMBER.sub(r"\1*", path, count=1)
