"""Align the nodes of two graphs, and write both graphs as lines that differ only where the graphs do."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

from graphpeft.inspect.fx_text import tensor
from graphpeft.inspect.graph_model import shown
from graphpeft.inspect.node_text import statement
from graphpeft.ir.layers import block_of, layer_of_module
from graphpeft.rewrite.adapters import HOME

if TYPE_CHECKING:
    from networkx import MultiDiGraph


class Aligned:
    """Aligns operators module by module, in execution order, by operator and arguments but not by operands.

    Operands are compared afterwards, by their names in the first graph: an operator that reads something else is a changed
    line.
    """

    def __init__(self, before: MultiDiGraph[str], after: MultiDiGraph[str], named: bool) -> None:
        self.graphs = before, after
        self.groups = [_grouped(graph) for graph in self.graphs]
        self.paths = tuple(dict.fromkeys([*self.groups[0], *self.groups[1]]))
        self.called = {name: name for name in after}
        """Names for the second graph's nodes."""
        for path in self.paths:
            one, other = (group.get(path, []) for group in self.groups)
            self.called |= self._pairs(one, other, named)
        self.called |= self._outside()
        self.original = {called: name for name, called in self.called.items()}

    def _pairs(self, one: list[str], other: list[str], named: bool) -> dict[str, str]:
        """Map nodes of the second graph to names in the first; new nodes get names that the first does not use."""
        first, second = (
            [_look(graph, n) for n in names] for graph, names in zip(self.graphs, (one, other), strict=True)
        )
        if named:
            known = dict(zip(one, first, strict=True))
            return {name: name for name, look in zip(other, second, strict=True) if known.get(name) == look}
        found: dict[str, str] = {}
        for tag, a, b, c, d in SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
            if tag == "equal":
                found |= dict(zip(other[c:d], one[a:b], strict=True))
        taken = set(self.graphs[0])
        return found | {name: f"{name}_new" for name in other if name not in found and name in taken}

    def _outside(self) -> dict[str, str]:
        """Inputs, weights and constants match by name."""
        one = {_held(self.graphs[0], name): name for name in self.graphs[0]}
        held = ((name, _held(self.graphs[1], name)) for name in self.graphs[1])
        return {name: one[key] for name, key in held if key is not None and key in one}

    def lines(self, path: str) -> tuple[list[str], list[str]]:
        """A module's operators in both graphs. Values are written `%name`, with the names of the first graph."""
        one, other = (group.get(path, []) for group in self.groups)
        before = [_line(self.graphs[0], name, path, {}) for name in one]
        return before, [_line(self.graphs[1], name, path, self.called) for name in other]

    def stem(self, called: str, path: str) -> str:
        """A short name for a value: its operator, or `x` if it comes from outside of the module's block."""
        original = self.original.get(called, called)
        about = next(
            graph.nodes[name] for graph, name in zip(self.graphs, (called, original), strict=True) if name in graph
        )
        outside = about["kind"] == "op" and _block(about.get("path", "")) != _block(path)
        if about["kind"] == "constant":
            return "const"
        return "x" if outside else re.sub(r"\W", "_", about["op"].rpartition(".")[2])


def _block(path: str) -> tuple[str, int | None]:
    return block_of(path), layer_of_module(path)


def _grouped(graph: MultiDiGraph[str]) -> dict[str, list[str]]:
    """Operators by the module that runs them; an adapter's operators by the module that it adapts."""
    found: dict[str, list[str]] = {}
    for name, about in graph.nodes(data=True):
        if about["kind"] in {"op", "output"}:
            home = f".{about.get('path', '')}".partition(f".{HOME}.")[0].removeprefix(".")
            found.setdefault(home, []).append(name)
    return found


def _look(graph: MultiDiGraph[str], name: str) -> tuple[str, ...]:
    about = graph.nodes[name]
    return about["op"], about.get("arguments", ""), about.get("shape", ""), about.get("adapter", "")


def _held(graph: MultiDiGraph[str], name: str) -> tuple[str, str] | None:
    about = graph.nodes[name]
    return None if about["kind"] in {"op", "output"} else (about["kind"], about.get("weight", about["op"]))


def _line(graph: MultiDiGraph[str], name: str, path: str, called: dict[str, str]) -> str:
    about = graph.nodes[name]
    operand = iter([_operand(graph, source, path, called) for source in operands(graph, name)])
    arguments = re.sub("%", lambda _: next(operand, "%"), about.get("arguments", ""))
    return statement(called.get(name, name), about["op"], arguments, about["kind"] == "output")


def _operand(graph: MultiDiGraph[str], name: str, path: str, called: dict[str, str]) -> str:
    about = graph.nodes[name]
    if about["kind"] == "weight":
        return tensor(shown(about).removeprefix(f"{path}."))
    named = about.get("adapter") and about["kind"] in {"constant", "input"}  # an adapter's constant, or a slot
    return str(about["op"]).removeprefix(f"{path}.") if named else f"%{called.get(name, name)}"


def operands(graph: MultiDiGraph[str], name: str) -> list[str]:
    """The nodes that a node reads, in the order of its argument text."""
    text = graph.nodes[name].get("arguments", "")

    def place(edge: tuple[str, str, str]) -> tuple[int, list[int]]:
        first, *rest = edge[2].split(".")
        numbers = [int(part) for part in rest]
        return (0, [int(first), *numbers]) if first.isdigit() else (1 + text.find(f"{first}="), numbers)

    edges = [
        edge
        for edge in graph.in_edges(name, data="port")
        if edge[2][0].isdigit() or f"{edge[2].partition('.')[0]}=" in text
    ]
    return [source for source, _, _ in sorted(edges, key=place)]
