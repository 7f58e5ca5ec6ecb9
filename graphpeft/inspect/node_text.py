"""How every view writes a node: `%name = op(arguments)`, and how values and tensors stand among the arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx


def statement(name: str, op: str, arguments: str, output: bool = False) -> str:
    """A node's line."""
    return f"return {arguments}" if output else f"%{name} = {op}({arguments})"


def arguments(node: fx.Node, show: Callable[[fx.Node, str], str]) -> str:
    """A node's arguments; `show` writes a node among them, given its port: `1`, `0.2` within a list, or a name."""

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
