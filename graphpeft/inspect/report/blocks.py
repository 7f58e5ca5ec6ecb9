"""Split a model's graph into pieces that fit a screen: repeated blocks, with equal ones collapsed, and the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphpeft.ir.layers import any_layer_of_module, block_of
from graphpeft.show.folding import layers_text

if TYPE_CHECKING:
    from networkx import MultiDiGraph

Key = tuple[str, int | None]
"""A block's path with `*` for its index, and the index."""
Drawn = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Block:
    """One kind of block, with the graphs of its first layer."""

    name: str
    """Path with `*` for the index; empty for nodes outside of blocks."""
    layers: tuple[int | None, ...]
    before: Drawn
    after: Drawn

    @property
    def label(self) -> str:
        return f"{self.name}  {layers_text(self.layers)}" if self.name else "outside of blocks"

    def node(self, weight: str, role: str, adapter: str) -> str | None:
        """The node that represents a site: the last one that its adapter inserted, or the projection itself."""
        found = [node for node in self.after["nodes"] if node["kind"] == "op"]
        inserted = [
            n for n in found if n["adapter"] and n["site"] == weight and n["role"] == role and n["of"] == adapter
        ]
        plain = [node for node in found if not node["adapter"] and node["weight"] == weight]
        return (inserted or plain or [{"id": None}])[-1]["id"]

    def as_dict(self) -> dict[str, Any]:
        layers = [layer for layer in self.layers if layer is not None]
        return {"name": self.name, "label": self.label, "layers": layers, "before": self.before, "after": self.after}


def blocks(before: MultiDiGraph[str], after: MultiDiGraph[str]) -> list[Block]:
    """The blocks of two graphs of a model, in execution order."""
    groups = {"before": _grouped(before), "after": _grouped(after)}
    folded: dict[tuple[object, ...], list[Key]] = {}
    for key in dict.fromkeys([*groups["after"], *groups["before"]]):
        looks = [_signature(graph, groups[side].get(key, [])) for side, graph in (("before", before), ("after", after))]
        folded.setdefault((key[0], *looks), []).append(key)
    made = []
    for keys in folded.values():
        first = keys[0]
        drawn = [_drawn(graph, groups[side].get(first, [])) for side, graph in (("before", before), ("after", after))]
        made.append(Block(first[0], tuple(layer for _, layer in keys), *drawn))
    return sorted(made, key=lambda block: not block.name)


def _grouped(graph: MultiDiGraph[str]) -> dict[Key, list[str]]:
    """Nodes by block. A weight or constant without a module belongs to its only reader's block."""
    found: dict[Key, list[str]] = {}
    for name, about in graph.nodes(data=True):
        key = _key(about)
        if not key[0] and about["kind"] in {"weight", "constant"}:
            readers = {_key(graph.nodes[reader]) for reader in graph.successors(name)}
            key = readers.pop() if len(readers) == 1 else key
        found.setdefault(key, []).append(name)
    return found


def _key(about: Mapping[str, Any]) -> Key:
    name = block_of(about.get("path", ""))
    return name, about.get("layer") if name else None


def _signature(graph: MultiDiGraph[str], names: list[str]) -> object:
    """A value that is equal for blocks that look the same: nodes in order, and edges by their source's position."""
    number = {name: i for i, name in enumerate(names)}
    return tuple(
        (
            *(any_layer_of_module(value) if key in PATHS else value for key, value in about.items() if key in SEEN),
            *sorted((port, number.get(source, -1)) for source, _, port in graph.in_edges(name, data="port")),
        )
        for name, about in ((name, graph.nodes[name]) for name in names)
    )


SEEN = frozenset({"kind", "op", "arguments", "path", "shape", "dtype", "weight", "adapter", "role", "rule", "method"})
PATHS = frozenset({"path", "weight"})


def _drawn(graph: MultiDiGraph[str], names: Iterable[str]) -> Drawn:
    """A block's nodes and edges, plus a node for each value that enters or leaves it."""
    inside = dict.fromkeys(names)
    nodes = [_node(name, graph.nodes[name]) for name in inside]
    edges = []
    entering: dict[str, None] = {}
    leaving: dict[str, None] = {}
    for name in inside:
        for source, _, port in graph.in_edges(name, data="port"):
            if source not in inside:
                entering[source] = None
            edges.append({"from": source if source in inside else f"in {source}", "to": name, "port": port})
        if any(reader not in inside for reader in graph.successors(name)):
            leaving[name] = None
            edges.append({"from": name, "to": f"out {name}", "port": "0"})
    nodes += [_edge_node(f"in {name}", "input", graph.nodes[name]) for name in entering]
    nodes += [_edge_node(f"out {name}", "output", graph.nodes[name]) for name in leaving]
    return {"nodes": nodes, "edges": edges}


def _node(name: str, about: Mapping[str, Any]) -> dict[str, Any]:
    path = about.get("path", "")
    block = block_of(path)
    branch = path.rpartition(".adapters.")[2] if about.get("adapter") else ""
    weight = about.get("weight", "")
    return {
        "id": name,
        "kind": about["kind"],
        "op": about["op"],
        "arguments": about.get("arguments", ""),
        "module": any_layer_of_module(path).removeprefix(block).removeprefix("."),
        "path": any_layer_of_module(path),
        "adapter": branch,
        "of": about.get("adapter", ""),
        "site": any_layer_of_module(about.get("site", weight)),
        "weight": any_layer_of_module(weight),
        **{key: about.get(key, "") for key in ("type", "shape", "dtype", "source", "code", "role", "rule", "method")},
    }


def _edge_node(name: str, kind: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """A node for a value that enters or leaves the block."""
    path = about.get("path", "")
    shown = {**_node(name, about), "kind": kind, "module": "", "adapter": "", "of": "", "weight": "", "site": ""}
    return shown | {"op": path.rpartition(".")[2] or about["op"]}
