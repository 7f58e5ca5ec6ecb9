"""The text of a node in all views: `%name = op(arguments)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx


def statement(name: str, op: str, arguments: str, output: bool = False) -> str:
    """A node's line."""
    return f"return {arguments}" if output else f"%{name} = {op}({arguments})"


def arguments(node: fx.Node, show: Callable[[fx.Node, str], str]) -> str:
    """A node's arguments as text. `show(node, port)` writes a node; a port is `1`, `0.2` in a list, or a keyword."""

    def written(value: Any, port: str) -> str:
        if isinstance(value, fx.Node):
            return show(value, port)
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(written(each, f"{port}.{i}") for i, each in enumerate(value)) + "]"
        if isinstance(value, slice):
            bounds = (value.start, value.stop, *(() if value.step is None else (value.step,)))
            return ":".join("" if each is None else written(each, f"{port}.{i}") for i, each in enumerate(bounds))
        return str(value)

    given = [written(value, str(i)) for i, value in enumerate(node.args)]
    return ", ".join([*given, *(f"{name}={written(value, name)}" for name, value in node.kwargs.items())])
