"""The subject of a pass as lines of text and operator counts, read from its current state without a capture."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from functools import singledispatch
from typing import Any, cast

import onnx_ir as ir
import torch
from torch import fx, nn
from torch.export import ExportedProgram

from graphpeft.inspect.fx_text import lines
from graphpeft.ir.program import Program
from graphpeft.match.find import SearchResult
from graphpeft.match.products import op
from graphpeft.planning.plan import Plan
from graphpeft.rewrite.adapters import HOME, Adapters, home
from graphpeft.rewrite.graph import with_numbers
from graphpeft.rewrite.owner import Adapted
from graphpeft.rewrite.state import find_state
from graphpeft.show.sites import headings, site_row
from graphpeft.show.table import table

NO_OP = {"placeholder", "get_attr", "output"}


@singledispatch
def listing(subject: Any) -> list[str]:
    """Lines of a module, program, graph, ONNX model, plan or sites; none for anything else."""
    return []


@singledispatch
def ops(subject: Any) -> Counter[str]:
    """A graph's operators by name; for a module with adapters, the operators that adapters add to owners' graphs."""
    return Counter()


def listed(subject: Any) -> bool:
    """Whether a subject can be listed."""
    return listing.dispatch(type(subject)) is not listing.dispatch(object)


def alike(one: Any, other: Any) -> bool:
    """Whether two subjects are of the same kind, so that their lines can be compared."""
    return listing.dispatch(type(one)) is listing.dispatch(type(other))


# -- torch.fx graphs -----------------------------------------------------------------------------------------------


@listing.register
def _(subject: fx.Graph) -> list[str]:
    inputs = [n for n in subject.nodes if n.op == "placeholder"]
    called = [n for n in subject.nodes if n.op not in {"placeholder", "get_attr"}]
    shown = zip(lines(subject), called, strict=True)
    return [*(f"input %{n.name}{_shape(n)}" for n in inputs), *(f"{line}{_shape(n)}" for line, n in shown)]


@listing.register
def _(subject: Program) -> list[str]:
    weights = {node.name: name for node, name in subject.weights.items()}
    found = listing(subject.graph)
    return [f"{line}  = {weights[key]}" if (key := _input(line)) in weights else line for line in found]


@listing.register
def _(subject: ExportedProgram) -> list[str]:
    return listing(subject.graph)


@ops.register
def _(subject: fx.Graph) -> Counter[str]:
    return Counter(op(n) for n in subject.nodes if n.op not in NO_OP)


@ops.register(Program)
@ops.register(ExportedProgram)
def _(subject: Program | ExportedProgram) -> Counter[str]:
    return ops(subject.graph)


def _input(line: str) -> str:
    return line.removeprefix("input %").partition(" ")[0] if line.startswith("input %") else ""


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    return f"  {_tensor(value)}" if isinstance(value, torch.Tensor) else ""


def _tensor(value: torch.Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} [{', '.join(map(str, value.shape))}]"


# -- modules -------------------------------------------------------------------------------------------------------


@listing.register
def _(subject: nn.Module) -> list[str]:
    """Each owner of adapters, with its graph and its adapters' tensors; other modules only as a parameter count."""
    owners = list(_owners(subject))
    inside = {id(p) for _, _, adapters in owners for p in adapters.parameters()}
    count = sum(p.numel() for p in subject.parameters() if id(p) not in inside)
    state = find_state(subject)
    merged = f", with {', '.join(state.merged)} merged" if state is not None and state.merged else ""
    found = [f"{type(subject).__name__}: {count:,} parameters{merged}"]
    if isinstance(subject, fx.GraphModule) and not owners:
        found += listing(subject.graph)
    for path, owner, adapters in owners:
        found += ["", f"{path or '(whole graph)'}: {type(owner).__name__}"]
        found += [f"  {line}" for line in (*_code(owner, adapters), *_tensors(adapters))]
    return found


@ops.register
def _(subject: nn.Module) -> Counter[str]:
    if isinstance(subject, fx.GraphModule):
        return ops(subject.graph)
    found: Counter[str] = Counter()
    for _, owner, adapters in _owners(subject):
        if (graph := _graph(owner, adapters)) is not None:
            found += Counter(op(n) for n in graph.nodes if n.op not in NO_OP and "graphpeft" in n.meta)
        found["delta"] += len(_shown(owner, adapters))
    return +found


def _owners(model: nn.Module) -> Iterable[tuple[str, nn.Module, Adapters]]:
    return [(path, m, adapters) for path, m in model.named_modules() if (adapters := home(m)) is not None]


def _code(owner: nn.Module, adapters: Adapters) -> list[str]:
    graph = _graph(owner, adapters)
    shown = [f"{weight} + delta({path.removeprefix(f'{HOME}.')})" for weight, path in _shown(owner, adapters)]
    return [*shown, *(listing(graph) if graph is not None else [])]


def _tensors(adapters: Adapters) -> list[str]:
    parameters = adapters.named_parameters()
    return [f"{name} {_tensor(p)}{'' if p.requires_grad else ', frozen'}" for name, p in parameters]


def _graph(owner: nn.Module, adapters: Adapters) -> fx.Graph | None:
    """The owner's rewritten graph, if an adapter runs in it."""
    running = isinstance(owner, fx.GraphModule) or bool(adapters.running())
    graph = cast("fx.Graph | None", getattr(owner, "graph", None)) if running else None
    return None if graph is None else with_numbers(copy.deepcopy(graph), owner)


def _shown(owner: nn.Module, adapters: Adapters) -> list[tuple[str, str]]:
    """Weights that the owner exposes as weight + delta, outside of any graph, and the branches that compute delta."""
    reads = owner.reads if isinstance(owner, Adapted) else frozenset()
    return [(s.weight.rpartition(".")[2], path) for s, _, path in adapters.running() if path in reads]


# -- ONNX ----------------------------------------------------------------------------------------------------------


@listing.register
def _(subject: ir.Model) -> list[str]:
    inputs = [f"input {value.name}{_value(value)}" for value in subject.graph.inputs]
    constants = [
        f"constant {value.name}{_value(value)}"
        for value in subject.graph.initializers.values()
        if not value.is_graph_input()
    ]
    outputs = ", ".join(str(value.name) for value in subject.graph.outputs)
    return [*inputs, *constants, *map(_node, subject.graph), f"return {outputs}"]


@ops.register
def _(subject: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in subject.graph)


def _node(node: ir.Node) -> str:
    inputs = [str(value.name) if value is not None else "_" for value in node.inputs]
    plain = {ir.AttributeType.TENSOR, ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}
    options = [f"{a.name}={a.value}" for a in node.attributes.values() if a.type not in plain]
    outputs = ", ".join(str(value.name) for value in node.outputs)
    return f"{outputs} = {node.op_type}({', '.join([*inputs, *options])}){_value(node.outputs[0])}"


def _value(value: ir.Value) -> str:
    if value.dtype is None or value.shape is None:
        return ""
    default = ", optional" if value.is_graph_input() and value.const_value is not None else ""
    return f"  {value.dtype.name.lower()} [{', '.join(map(str, value.shape))}]{default}"


# -- sites ---------------------------------------------------------------------------------------------------------


@listing.register
def _(subject: SearchResult) -> list[str]:
    shown = ("role", "weight", "rows", "size", "form", "source")
    rows = [site_row(site).cells(*shown) for site in subject.sites]
    missed = [f"no {name}: {miss.reason}" for name, miss in subject.misses.items()]
    return [*table(headings(*shown), rows).splitlines(), *missed]


@listing.register
def _(subject: Plan) -> list[str]:
    return str(subject).splitlines()
