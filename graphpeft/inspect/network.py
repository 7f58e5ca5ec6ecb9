"""Build networkx graphs, the one form that all views use to draw, compare, write and query graphs.

Nodes carry only strings and numbers, so that every file format accepts them. Edges carry the port that they enter, because
`sub(a, b)` is not `sub(b, a)`. Nodes are in execution order. `graph_model.Node` documents their attributes.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from graphpeft.compat.fake_tensors import is_fake
from graphpeft.compat.quantized import dequantize, library
from graphpeft.inspect.graph_model import Node
from graphpeft.inspect.node_text import arguments
from graphpeft.inspect.rewrite import Branch, CapturedGraph, Rewrite
from graphpeft.ir.layers import layer_of_module
from graphpeft.ir.source import code_of, location, runner
from graphpeft.match.fused import concrete
from graphpeft.match.products import op
from graphpeft.rewrite.adapters import HOME
from graphpeft.rewrite.state import find_state

if TYPE_CHECKING:
    from networkx import MultiDiGraph


def network(rewritten: Rewrite, adapted: bool = True, values: bool = False) -> MultiDiGraph[str]:
    """The graph after a rewrite, or (`adapted=False`) before. Parts that were captured separately are not connected."""
    import networkx

    graph: MultiDiGraph[str] = networkx.MultiDiGraph(name=rewritten.name)
    work = _Builder(rewritten, values and adapted, values)
    for part in rewritten.parts:
        nodes = list((part.after if adapted else part.before).nodes)
        read = {str(node.target) for node in nodes if node.op == "get_attr"}
        for node in nodes:
            work.add(graph, node, part)
            if node.op in {"get_attr", "call_module"}:
                work.hold(graph, node, part, read)
    return graph


class _Builder:
    def __init__(self, rewritten: Rewrite, merged: bool, values: bool) -> None:
        self.model, self.values = rewritten.model, values
        self.branches = {branch.path: branch for branch in rewritten.branches}
        self.parameters = dict(rewritten.model.named_parameters(remove_duplicate=False))
        self.roles: dict[int, list[str]] = {}  # by parameter: a tied one has several names
        for site in rewritten.found.sites:
            for place in (site, *site.tied):
                if place.role != "other":
                    self.roles.setdefault(id(self.parameters[place.weight]), []).append(place.role)
        state = find_state(rewritten.model)
        self.originals: Mapping[str, torch.Tensor] = {} if state is None or merged else state.originals

    def add(self, graph: MultiDiGraph[str], node: fx.Node, part: CapturedGraph) -> None:
        if node.op == "placeholder" and not node.users:
            return
        prefix = f"{part.path}." if part.path else ""
        text, edges = _arguments(node)
        about: Node = {"kind": _kind(node), "op": _op(node, part.model), "arguments": text}
        if node.name in part.constants:
            about["kind"] = "constant"
        about |= {**_value(node), **_place(node, prefix, part.model)}
        if node.op == "get_attr":
            about |= self._weight(f"{prefix}{node.target}")
            about.setdefault("path", f"{prefix}{node.target}".rpartition(".")[0])
        if "graphpeft" in node.meta:
            about |= _inserted(self.branches[prefix + node.meta["graphpeft"]])
        if (layer := layer_of_module(about.get("path", ""))) is not None:
            about["layer"] = layer
        name = prefix + node.name
        graph.add_node(name, **about)
        for port, source in edges:
            graph.add_edge(prefix + source.name, name, key=port, port=port)
            read = graph.nodes[prefix + source.name]
            if "adapter" in about or read["kind"] != "weight":
                continue
            if roles := self.roles.get(id(self.parameters[read["weight"]])):
                graph.nodes[name].update(role="+".join(dict.fromkeys(roles)), weight=read["weight"])

    def hold(self, graph: MultiDiGraph[str], node: fx.Node, part: CapturedGraph, read: set[str]) -> None:
        """Add the parameters of a branch that is called as a module, except those that the graph reads itself."""
        whole = node.op == "call_module" or "val" not in node.meta
        branch = part.model.get_submodule(str(node.target)) if whole else None
        prefix = f"{part.path}." if part.path else ""
        for name, parameter in branch.named_parameters() if branch is not None else ():
            if (target := f"{node.target}.{name}") not in read:
                inner = f"{prefix}{node.name}.{name}"
                about = dict(graph.nodes[prefix + node.name]) | {"op": name, **_looks(parameter)}
                graph.add_node(inner, **about | self._weight(prefix + target))
                graph.add_edge(inner, prefix + node.name, key=name, port=name)

    def _weight(self, name: str) -> Node:
        tensor = self.parameters.get(name)
        if tensor is None:
            return {}
        about: Node = {"kind": "weight", "weight": name, "numbers": tensor.numel()}
        if self.values and not tensor.is_meta and not is_fake(tensor):
            about["values"] = checksum(self.originals.get(name, tensor))
        return about


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes; a quantized tensor is dequantized first. Equal values give equal checksums."""
    tensor = dequantize(tensor) if library(tensor) == "torchao" else tensor
    return zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _inserted(branch: Branch) -> Node:
    entry = branch.entry
    path = branch.path
    if not branch.place.owner:  # in a graph module, the root holds all adapters
        path = f"{branch.place.weight.rpartition('.')[0]}.{HOME}.{branch.adapter}.{branch.place.role}"
    return {
        "path": path,
        "adapter": branch.adapter,
        "role": branch.place.role,
        "site": branch.place.weight,
        "rule": entry.rule,
        "method": str(entry.method),
        "source": branch.place.source,
    }


def _kind(node: fx.Node) -> str:
    return {"placeholder": "input", "get_attr": "constant", "output": "output"}.get(node.op, "op")


def _op(node: fx.Node, model: nn.Module) -> str:
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))).__name__
    if node.op in {"placeholder", "get_attr"}:
        return str(node.target).rpartition(".")[2]
    return op(node)


def _arguments(node: fx.Node) -> tuple[str, list[tuple[str, fx.Node]]]:
    """The arguments' text with `%` for each node, and these nodes with their ports."""
    edges: list[tuple[str, fx.Node]] = []

    def show(read: fx.Node, port: str) -> str:
        edges.append((port, read))
        return "%"

    return arguments(node, show), edges


def _value(node: fx.Node) -> Node:
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)) and len(value) == 1:
        (value,) = value
    return _looks(value) if isinstance(value, torch.Tensor) else {}


def _looks(value: torch.Tensor) -> Node:
    return {"shape": " × ".join(map(str, concrete(value.shape))), "dtype": str(value.dtype).removeprefix("torch.")}


def _place(node: fx.Node, prefix: str, model: nn.Module) -> Node:
    about: Node = {}
    if stack := list((node.meta.get("nn_module_stack") or {}).values()):
        path, kind = stack[-1]
        about["path"] = (prefix + str(path).partition("@")[0]).removesuffix(".")
        about["type"] = (kind if isinstance(kind, str) else kind.__qualname__).rpartition(".")[2]
    owner = runner(node, model)
    if source := location(node, owner):
        about |= {"source": source, "code": code_of(node, owner)}
    return about
