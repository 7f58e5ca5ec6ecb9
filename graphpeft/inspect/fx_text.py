"""A graph of torch.fx as lines of text."""

from __future__ import annotations

import re
from typing import Any

from torch import fx

from graphpeft.match.products import op
from graphpeft.rewrite.adapters import HOME


def lines(graph: fx.Graph) -> list[str]:
    """One operator a line; inputs and parameters appear where they are used."""
    return [_line(n) for n in graph.nodes if n.op not in {"placeholder", "get_attr"}]


def _line(node: fx.Node) -> str:
    def show(value: Any) -> str:
        if isinstance(value, fx.Node):
            return tensor(str(value.target)) if value.op == "get_attr" else f"%{value.name}"
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(map(show, value)) + "]"
        return str(value)

    arguments = ", ".join([*map(show, node.args), *(f"{k}={show(v)}" for k, v in node.kwargs.items())])
    if node.op == "output":
        return f"return {arguments}"
    return f"%{node.name} = {node.target if node.op == 'call_module' else op(node)}({arguments})"


def tensor(path: str) -> str:
    """A tensor's path; one of an adapter as `default.q[1].weight`, the tensor of the chain's factor 1."""
    return re.sub(r"^(.+)\.factors\.(\d+)\.", r"\1[\2].", path.removeprefix(f"{HOME}."))
