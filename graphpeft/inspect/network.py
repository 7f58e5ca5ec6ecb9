"""Graphs as networkx knows them: one form for what is drawn, compared, written to files, and asked questions.

A node carries plain strings and numbers only, so that every format takes it; an edge carries the port that it enters, for
`sub(a, b)` is not `sub(b, a)`. Nodes stand in the order in which they run. What the attributes mean is in `Node`.
"""

from __future__ import annotations

import linecache
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from graphpeft.capturing.capture import Inputs
from graphpeft.compat.fake_tensors import is_fake
from graphpeft.compat.quantized import dense, library
from graphpeft.inspect.rewrite import Branch, Part, Rewrite, rewrite
from graphpeft.match.fused import concrete
from graphpeft.match.products import op
from graphpeft.planning.suggest import any_layer
from graphpeft.rewrite.adapters import HOME
from graphpeft.rewrite.state import find_state

if TYPE_CHECKING:
    from networkx import MultiDiGraph


class Node(TypedDict, total=False):
    """Attributes of a node. What does not apply is left out, but for `kind` and `op`."""

    kind: str
    """`input`, `weight`, `constant`, `op` or `output`."""
    op: str
    """The operator's plain name."""
    arguments: str
    """Its arguments as text, with `%` for each edge that enters: `%, [%, %], dim=1`."""
    path: str
    """The module that ran it, from the root; of an inserted node the adapter's branch below that module."""
    type: str
    """The class of that module."""
    layer: int
    """The number of the repeated block that it is in."""
    shape: str
    dtype: str
    source: str
    """`file.py:line` of the model's code."""
    code: str
    """That line."""
    weight: str
    """Of a node that reads a parameter: its name in `state_dict()`. Of a projection: the parameter's."""
    values: int
    """A checksum of a weight's values."""
    numbers: int
    """How many numbers a weight holds."""
    role: str
    site: str
    """Of an inserted node: the weight that it adapts."""
    adapter: str
    """Of an inserted node: the adapter's name."""
    rule: str
    method: str


def to_networkx(model: Any, inputs: Inputs = None, *, adapted: bool = True, values: bool = False) -> MultiDiGraph[str]:
    """A model's graph as a `networkx.MultiDiGraph`, its active adapters in it unless `adapted` is false.

    Args:
        model: a module or an exported program; what `graphpeft.export` wrote, as a folder, an `.onnx` file or an
            `onnx_ir.Model`; a `.json` file that `write_graph` wrote; or a graph of networkx, which is returned.
        inputs: an example call, if none can be made from the model's config and `apply` was given none.
        values: also note checksums of the weights, so that a comparison sees which have changed.

    Raises: `CaptureError`, `FileError`.
    """
    import networkx

    from graphpeft.inspect import graph_files as files
    from graphpeft.inspect import onnx_network

    if isinstance(model, networkx.MultiDiGraph):
        return model
    if isinstance(model, (str, os.PathLike)):
        path = Path(model)
        return files.read_graph(path) if path.suffix == ".json" else onnx_network.read(path, values)
    if not isinstance(model, (nn.Module, ExportedProgram)):
        return onnx_network.network(onnx_network.as_ir(model), values)
    return network(rewrite(model, inputs), adapted, values)


def network(rewritten: Rewrite, adapted: bool = True, values: bool = False) -> MultiDiGraph[str]:
    """The graph of a rewrite, after it or (`adapted=False`) before. Parts that were captured apart stand side by side."""
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
        self.roles: dict[int, list[str]] = {}  # by the parameter: a tied one has several names
        for site in rewritten.found.sites:
            for place in (site, *site.tied):
                if place.role != "other":
                    self.roles.setdefault(id(self.parameters[place.weight]), []).append(place.role)
        state = find_state(rewritten.model)
        self.originals: Mapping[str, torch.Tensor] = {} if state is None or merged else state.originals

    def add(self, graph: MultiDiGraph[str], node: fx.Node, part: Part) -> None:
        if node.op == "placeholder" and not node.users:
            return
        prefix = f"{part.path}." if part.path else ""
        text, edges = _arguments(node)
        about: Node = {"kind": _kind(node), "op": _op(node, part.model), "arguments": text}
        if node.name in part.constants:
            about["kind"] = "constant"
        about |= {**_value(node), **_place(node, prefix)}
        if node.op == "get_attr":
            about |= self._weight(f"{prefix}{node.target}")
            about.setdefault("path", f"{prefix}{node.target}".rpartition(".")[0])
        if "graphpeft" in node.meta:
            about |= _inserted(self.branches[prefix + node.meta["graphpeft"]])
        if (layer := layer_of(about.get("path", ""))) is not None:
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

    def hold(self, graph: MultiDiGraph[str], node: fx.Node, part: Part, read: set[str]) -> None:
        """The parameters of what is called as a whole, but for those that the graph reads by themselves."""
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
    """The same for equal values; CRC-32 of the bytes, of a quantized tensor those of its floats."""
    tensor = dense(tensor) if library(tensor) == "torchao" else tensor
    return zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _inserted(branch: Branch) -> Node:
    entry = branch.entry
    path = branch.path
    if not branch.place.owner:  # all adapters of a whole graph are in its root, whatever they adapt
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
    """The arguments' text, and the nodes among them by port: `1`, `0.2` within a list, or a name."""
    edges: list[tuple[str, fx.Node]] = []

    def show(value: Any, port: str) -> str:
        if isinstance(value, fx.Node):
            edges.append((port, value))
            return "%"
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(show(each, f"{port}.{i}") for i, each in enumerate(value)) + "]"
        if isinstance(value, slice):
            bounds = (value.start, value.stop, *(() if value.step is None else (value.step,)))
            return ":".join("" if each is None else show(each, f"{port}.{i}") for i, each in enumerate(bounds))
        return str(value)

    given = [show(value, str(i)) for i, value in enumerate(node.args)]
    given += [f"{name}={show(value, name)}" for name, value in node.kwargs.items()]
    return ", ".join(given), edges


def _value(node: fx.Node) -> Node:
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)) and len(value) == 1:
        (value,) = value
    return _looks(value) if isinstance(value, torch.Tensor) else {}


def _looks(value: torch.Tensor) -> Node:
    return {"shape": " × ".join(map(str, concrete(value.shape))), "dtype": str(value.dtype).removeprefix("torch.")}


def _place(node: fx.Node, prefix: str) -> Node:
    about: Node = {}
    if stack := list((node.meta.get("nn_module_stack") or {}).values()):
        path, kind = stack[-1]
        about["path"] = (prefix + str(path).partition("@")[0]).removesuffix(".")
        about["type"] = (kind if isinstance(kind, str) else kind.__qualname__).rpartition(".")[2]
    if source := location(node):
        about |= {"source": source, "code": code_of(node)}
    return about


def location(node: fx.Node) -> str:
    """`file.py:line` of the model's own code behind a node; empty where the capture knows none."""
    frames = list(_frames(node))
    return f"{PurePath(frames[-1][0]).name}:{frames[-1][1]}" if frames else ""


def code_of(node: fx.Node) -> str:
    """That line."""
    frames = list(_frames(node))
    return linecache.getline(frames[-1][0], int(frames[-1][1])).strip() if frames else ""


def _frames(node: fx.Node) -> Iterator[tuple[str, str]]:
    """Files and lines of the model's own code that led to a node, the innermost last."""
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    # GPT-2's Conv1D is in a file of its own: its caller says more.
    yield from (f for f in found if "torch" not in PurePath(f[0]).parts and PurePath(f[0]).name != "pytorch_utils.py")


def shown(about: Mapping[str, Any]) -> str:
    """A parameter's name; an adapter's below the module that it adapts, wherever it is kept."""
    weight, adapter = about["weight"], about.get("adapter")
    return f"{about['path']}.{weight.partition(f'{HOME}.{adapter}.')[2].partition('.')[2]}" if adapter else str(weight)


def layer_of(path: str) -> int | None:
    """The number of the repeated block that a module's path goes through."""
    found = re.search(r"\.(\d+)(\.|$)", path)
    return int(found[1]) if found else None


def block_of(path: str) -> str:
    """The path of the repeated block that a module is in, its number as `*`; empty outside of blocks."""
    found = re.match(r"(.*?)\.\d+(\.|$)", path)
    return f"{found[1]}.*" if found else ""


def general(path: str) -> str:
    """A module's or a weight's path, the block's number as `*`."""
    return any_layer(f"{path}.").removesuffix(".")
