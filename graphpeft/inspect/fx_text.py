"""A torch.fx graph as lines of text."""

from __future__ import annotations

import re

from torch import fx

from graphpeft.inspect.node_text import arguments, statement
from graphpeft.match.products import op
from graphpeft.rewrite.adapters import HOME


def lines(graph: fx.Graph) -> list[str]:
    """One line per operator; inputs and parameters appear where they are used."""
    return [_line(n) for n in graph.nodes if n.op not in {"placeholder", "get_attr"}]


def _line(node: fx.Node) -> str:
    def show(read: fx.Node, port: str) -> str:
        return tensor(str(read.target)) if read.op == "get_attr" else f"%{read.name}"

    kind = str(node.target) if node.op == "call_module" else op(node)
    return statement(node.name, kind, arguments(node, show), node.op == "output")


def tensor(path: str) -> str:
    """A tensor's path. An adapter's tensor is written `default.q[1].weight`, for factor 1 of the chain."""
    return re.sub(r"^(.+)\.factors\.(\d+)\.", r"\1[\2].", path.removeprefix(f"{HOME}."))
