"""Find the module that owns a projection: trace a module's own code and look for the projection in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx, nn

from graphpeft.compat.accelerate import has_instance_forward
from graphpeft.compat.quantized import kept_graph, packed
from graphpeft.ir.program import Program
from graphpeft.ir.weights import get_parameter
from graphpeft.match.products import PICKS, SAME, TRANSPOSES, Affine, behind_transposes, op, read_affine
from graphpeft.names import unwritable


def locate(program: Program, node: fx.Node, weight: str) -> tuple[str, Literal["branch", "weight"]]:
    """Path of the owner of a node that uses a weight, and whether a branch can be inserted there."""
    model = program.model
    parameter = get_parameter(model, weight)
    if program.whole:
        product = read_affine(node, program.weights.__contains__)
        plain = product is not None and product.plain and parameter.dim() == 2
        return "", "branch" if plain or read_lookup(node, program.weights.__contains__) else "weight"
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    path = stack[-1].partition("@")[0] if stack else ""
    while path and not any(p is parameter for p in model.get_submodule(path).parameters()):
        path = path.rpartition(".")[0]
    if _traceable(model.get_submodule(path), parameter) and not _bypassed(model, path):
        return path, "branch"
    return _holder(model, path, parameter), "weight"


def _holder(model: nn.Module, path: str, parameter: nn.Parameter) -> str:
    """The module at or below `path` that has the parameter itself: other modules may hold a tied one too."""
    inside = model.get_submodule(path).named_modules(prefix=path)
    return next(name for name, module in inside if any(p is parameter for p in module._parameters.values()))


def _traceable(owner: nn.Module, parameter: nn.Parameter) -> bool:
    if type(owner) is nn.Linear and not has_instance_forward(owner):
        return True
    graph = trace(owner)
    return graph is not None and bool(
        projections(owner, graph.nodes, parameter) or lookups(owner, graph.nodes, parameter)
    )


def _bypassed(model: nn.Module, path: str) -> bool:
    """Whether the parent reads the owner's weight without calling its `forward`, as torch's fused encoder does."""
    parent = model.get_submodule(path.rpartition(".")[0]) if path else None
    return isinstance(parent, (nn.TransformerEncoderLayer, nn.MultiheadAttention))


class _Tracer(fx.Tracer):
    """Traces a module's own code only: calls of submodules stay calls."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


CONSTANT = re.compile(r"_tensor_constant\d+")
"""Attributes in which FX stores the tensors that a module's code creates."""


def trace(module: nn.Module, keep: bool = False) -> fx.Graph | None:
    """The module's own FX graph, or `None` if its code cannot be traced or written, or was replaced on the instance.

    Tensors that the code creates become attributes of the module. They are deleted again unless `keep` is set, for a
    graph that will run.
    """
    if isinstance(module, fx.GraphModule):
        return module.graph
    if has_instance_forward(module):
        return None
    if packed(module):
        return kept_graph(module)
    before = set(module.__dict__)
    try:
        graph = _Tracer().trace(module)
        return None if unwritable(graph) else graph
    except Exception:
        # Tracing runs the module's code on proxies, so anything may be raised; the caller then uses the weight form.
        return None
    finally:
        if not keep:
            forget_constants(module, before)


def forget_constants(module: nn.Module, known: Collection[str] = ()) -> None:
    """Delete the constants that tracing left on the module, except the `known` ones."""
    for name in [n for n in module.__dict__ if n[:8] == "_tensor_" and CONSTANT.fullmatch(n) and n not in known]:
        del module.__dict__[name]


BEHIND = (
    TRANSPOSES | SAME | PICKS | {"getattr", "mul", "div", "slice", "split", "split_with_sizes", "chunk", "tensor_split"}
)
"""Operators through which `read_affine` sees a parameter."""


class Uses:
    """Where a graph uses its owner's parameters, found in one pass: separate searches would take quadratic time."""

    def __init__(self, owner: nn.Module, graph: fx.Graph) -> None:
        self.reads: dict[int, list[fx.Node]] = {}
        self.sums: dict[fx.Node, fx.Node] = {}
        """For each adapted node, the last sum of the node and its branches; the node itself stays in the graph."""
        self._owner = owner
        self._found: dict[nn.Parameter, tuple[list[Affine], list[Lookup], list[fx.Node]]] = {}
        self.place = {node: number for number, node in enumerate(graph.nodes)}
        for node in graph.nodes:
            if node.op == "get_attr":
                self.reads.setdefault(id(_attribute(owner, str(node.target))), []).append(node)

    def of(self, parameter: nn.Parameter) -> tuple[list[Affine], list[Lookup], list[fx.Node]]:
        """A parameter's projections, lookups and readers, as they were before a branch was inserted."""
        if parameter not in self._found:
            nodes = self.near(parameter)
            looked = self._owner, nodes, parameter
            self._found[parameter] = projections(*looked), lookups(*looked), readers(*looked)
        return self._found[parameter]

    def forget(self, parameter: nn.Parameter) -> None:
        """Search again at the next `of`, because the inputs of the parameter's projections have changed."""
        self._found.pop(parameter, None)

    def near(self, parameter: nn.Parameter) -> list[fx.Node]:
        """The nodes that read a parameter, and all nodes that may be a product or a lookup with it, in graph order."""
        found = dict.fromkeys(self.reads.get(id(parameter), ()))
        waiting = list(found)
        while waiting:
            node = waiting.pop()
            if node.op == "get_attr" or op(node) in BEHIND:
                fresh = [user for user in node.users if user not in found]
                found |= dict.fromkeys(fresh)
                waiting += fresh
        return sorted(found, key=lambda node: self.place.get(node, len(self.place)))


def projections(owner: nn.Module, nodes: Iterable[fx.Node], parameter: nn.Parameter) -> list[Affine]:
    """The projections by `parameter` among some nodes; none if any of them is not plain."""
    is_weight = _reads(owner, parameter)
    read = (read_affine(n, is_weight) for n in nodes if n.op in {"call_function", "call_method"})
    found = [a for a in read if a]
    return found if parameter.dim() == 2 and all(a.plain for a in found) else []


@dataclass(frozen=True)
class Lookup:
    """An embedding: `node` picks the rows `ids` of a parameter."""

    node: fx.Node
    ids: fx.Node
    padding_idx: int | None


def lookups(owner: nn.Module, nodes: Iterable[fx.Node], parameter: nn.Parameter) -> list[Lookup]:
    """The nodes that pick rows of `parameter`."""
    is_weight = _reads(owner, parameter)
    return [found for n in nodes if (found := read_lookup(n, is_weight))]


def read_lookup(node: fx.Node, is_weight: Callable[[fx.Node], bool]) -> Lookup | None:
    """`node` as an embedding by a parameter, or `None`. With `max_norm` it does not count: it is not linear."""
    if op(node) != "embedding":
        return None
    functional = node.target is nn.functional.embedding
    names = ("input", "weight", "padding_idx", "max_norm") if functional else ("weight", "indices", "padding_idx")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    ids, weight, padding = (
        given.get("input" if functional else "indices"),
        given.get("weight"),
        given.get("padding_idx"),
    )
    if not isinstance(ids, fx.Node) or not isinstance(weight, fx.Node) or given.get("max_norm") is not None:
        return None
    weight, flips = behind_transposes(weight)
    if flips or not is_weight(weight):
        return None
    # The operator itself writes "no padding" as -1.
    return Lookup(node, ids, padding if isinstance(padding, int) and (functional or padding != -1) else None)


def readers(owner: nn.Module, nodes: Iterable[fx.Node], parameter: nn.Parameter) -> list[fx.Node]:
    """The nodes that pass `parameter` to the rest of their graph."""
    return list(filter(_reads(owner, parameter), nodes))


def _reads(owner: nn.Module, parameter: nn.Parameter) -> Callable[[fx.Node], bool]:
    return lambda node: node.op == "get_attr" and _attribute(owner, str(node.target)) is parameter


def _attribute(owner: nn.Module, path: str) -> Any:
    value: Any = owner
    for name in path.split("."):
        value = getattr(value, name, None)
    return value
