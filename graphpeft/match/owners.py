"""Which module owns a projection: tracing a module's own code and finding the projection in it."""

from __future__ import annotations

from typing import Any, Literal

from torch import fx, nn

from graphpeft.match.dataflow import read_affine
from graphpeft.program import Program, stored


def locate(program: Program, node: fx.Node, weight: str) -> tuple[str, Literal["branch", "weight"]]:
    """Path of the owner of a captured projection, and whether a branch can be inserted there."""
    if program.whole:
        return "", "branch"
    model = program.model
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    path = stack[-1].partition("@")[0] if stack else ""
    parameter = stored(model, weight)
    while path and not any(p is parameter for p in model.get_submodule(path).parameters()):
        path = path.rpartition(".")[0]
    if _traceable(model.get_submodule(path), parameter) and not _bypassed(model, path):
        return path, "branch"
    return weight.rpartition(".")[0], "weight"


def _traceable(owner: nn.Module, parameter: nn.Parameter) -> bool:
    if type(owner) is nn.Linear and "forward" not in owner.__dict__:
        return True
    graph = trace(owner)
    return graph is not None and bool(projections(owner, graph, parameter))


def _bypassed(model: nn.Module, path: str) -> bool:
    """Whether the module around reads the owner's weight past its `forward`, as the fused path of torch's encoder does."""
    parent = model.get_submodule(path.rpartition(".")[0]) if path else None
    return isinstance(parent, (nn.TransformerEncoderLayer, nn.MultiheadAttention))


class _Tracer(fx.Tracer):
    """Traces a module's own code only: whatever it calls stays a call."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def trace(module: nn.Module) -> fx.Graph | None:
    """The module's own FX graph, or `None` where its code cannot be traced or was replaced on the instance."""
    if isinstance(module, fx.GraphModule):
        return module.graph
    if "forward" in module.__dict__:
        return None
    try:
        return _Tracer().trace(module)
    except Exception:
        # Tracing runs the module's code on proxies, so anything may be raised; the caller takes the weight form.
        return None


def projections(owner: nn.Module, graph: fx.Graph, parameter: nn.Parameter) -> list[tuple[fx.Node, fx.Node]]:
    """(projection, its input) for each node of `graph` that multiplies by `parameter`."""

    def is_weight(node: fx.Node) -> bool:
        return node.op == "get_attr" and _attribute(owner, str(node.target)) is parameter

    found = [read_affine(n, is_weight) for n in graph.nodes if n.op in {"call_function", "call_method"}]
    return [(a.node, a.input) for a in found if a]


def _attribute(owner: nn.Module, path: str) -> Any:
    value: Any = owner
    for name in path.split("."):
        value = getattr(value, name, None)
    return value
