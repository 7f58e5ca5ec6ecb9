"""Put the blocks that `blocks.py` left out back into a graph: copies of the first block, on their own weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from graphpeft.capturing import blocks
from graphpeft.capturing.blocks import FoldingError
from graphpeft.compat import pytree

BEGIN, BLOCK = torch.ops.graphpeft.begin.default, torch.ops.graphpeft.block.default


@dataclass(frozen=True)
class Segment:
    """The nodes of one traced block."""

    path: str
    inputs: list[fx.Node]
    after: list[fx.Node]
    """The nodes of the inputs after the block: a cast without effect or a change in place gives an input a new node."""
    nodes: list[fx.Node]
    outputs: list[fx.Node]
    outside: list[fx.Node]
    """Other nodes that the block reads: its own parameters and buffers, and lifted constants."""


def expand_blocks(model: nn.Module, exported: ExportedProgram) -> ExportedProgram:
    """Rewrite the program's graph, in place, into that of a full capture. Raises `FoldingError`."""
    unfolding = _Unfolding(model, exported)
    segments: dict[int, Segment] = {}
    for node in [n for n in exported.graph.nodes if n.target is BLOCK]:
        _, traced, number, path = _arguments(node)
        if not traced:
            outputs = unfolding.copy(segments[number], path, node)
        else:
            segment = unfolding.segment(node)
            unfolding.compare(segments.setdefault(number, segment), segment)
            outputs = segment.outputs
        for item in list(node.users):
            item.replace_all_uses_with(outputs[item.args[1]])
            exported.graph.erase_node(item)
        exported.graph.erase_node(node)
        if traced:
            exported.graph.erase_node(traced[0])
    return exported


def _arguments(end: fx.Node) -> Any:
    """(inputs, begin and outputs if the block was traced, number of the call, path) of a `block` operator."""
    return end.args


class _Unfolding:
    """The program to rewrite, and the model's tensor behind each placeholder."""

    def __init__(self, model: nn.Module, exported: ExportedProgram):
        self.model, self.graph = model, exported.graph
        signature = exported.graph_signature
        placeholders = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
        stored: dict[str, torch.Tensor] = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.held = {placeholders[arg]: stored[name] for arg, name in names.items()}
        self.node_of = {id(tensor): node for node, tensor in self.held.items()}
        lifted = signature.inputs_to_lifted_tensor_constants
        self.constants = {placeholders[arg]: exported.constants[name] for arg, name in lifted.items()}

    def segment(self, end: fx.Node) -> Segment:
        """The traced nodes of the block whose last node is `end`."""
        after, (start, *outputs), _, path = _arguments(end)
        inputs = start.args[0]
        nodes: list[fx.Node] = []
        node = start.next
        while node is not end:
            nodes.append(node)
            node = node.next
        inside = {*nodes, end}
        for node in nodes:
            node.meta["stack_trace"] = _models_own(node.meta.get("stack_trace"))
            if node.op != "call_function" or node.target in {BEGIN, BLOCK} or _symbolic(node):
                raise FoldingError(f"{path} holds the node {node.format_node()}")
            if not (node.users.keys() <= inside or node in after):
                raise FoldingError(f"{node.name}, made in {path}, is used outside of it")
        read = dict.fromkeys(n for node in [*nodes, end] for n in node.all_input_nodes)
        outside = [n for n in read if n not in inside and n not in inputs and n is not start]
        own = self._own(path)
        for node in outside:
            if node not in self.constants and not (node in self.held and id(self.held[node]) in own):
                raise FoldingError(f"{path} reads {node.name}, which is neither given to it nor its own")
        if any(node in self.held and id(self.held[node]) in own for node in inputs):
            raise FoldingError(f"{path} is given a weight of its own")
        return Segment(path, list(inputs), list(after), nodes, outputs, outside)

    def compare(self, one: Segment, other: Segment) -> None:
        """Raise `FoldingError` unless both blocks have the same nodes, apart from their inputs and weights."""
        if one is other:
            return
        same = self._entering(one, other.inputs, other.path)
        pairs = list(zip(one.nodes, other.nodes, strict=False))
        same.update(pairs)

        def equal(a: Any, b: Any) -> bool:
            if not isinstance(a, fx.Node):
                return type(a) is type(b) and (a is b or bool(a == b))
            known, found = self.constants.get(a), self.constants.get(b)
            return same[a] is b or (known is not None and found is not None and _identical(known, found))

        def alike(a: fx.Node, b: fx.Node) -> bool:
            (left, shape), (right, other_shape) = (pytree.tree_flatten((n.args, n.kwargs)) for n in (a, b))
            told = a.target is b.target and shape == other_shape and _value(a) == _value(b)
            return told and all(map(equal, left, right))

        def ends(segment: Segment) -> list[fx.Node]:
            return [*segment.after, *segment.outputs]

        fitting = len(one.nodes) == len(other.nodes) and len(ends(one)) == len(ends(other))
        if not fitting or not all(alike(*p) for p in pairs) or not all(map(equal, ends(one), ends(other))):
            raise FoldingError(f"{other.path} gives other nodes than {one.path}")

    def copy(self, segment: Segment, path: str, end: fx.Node) -> list[fx.Node]:
        """Insert a copy of the segment's nodes for the block at `path`, which `end` represents; returns its outputs."""
        inputs = _arguments(end)[0]
        made = self._entering(segment, inputs, path)
        with self.graph.inserting_before(end):
            for node in segment.nodes:
                made[node] = self.graph.node_copy(node, made.__getitem__)
                stack = node.meta.get("nn_module_stack")
                if stack is not None:
                    made[node].meta["nn_module_stack"] = _moved(stack, segment.path, path)
        for node, before, after in zip(inputs, segment.inputs, segment.after, strict=True):
            if before is not after:
                node.replace_all_uses_with(made[after], delete_user_cb=lambda user: user > end)
        return [made[n] for n in segment.outputs]

    def _entering(self, segment: Segment, inputs: list[fx.Node], path: str) -> dict[fx.Node, fx.Node]:
        """Map each node that the segment reads from outside to the node that the block at `path` reads."""
        entering = dict(zip(segment.inputs, inputs, strict=True))
        own, others = self._own(segment.path), self._tensors(path)
        for node in segment.outside:
            if node in self.constants:
                entering[node] = node
            else:
                entering[node] = self.node_of[id(others[own[id(self.held[node])]])]
        return entering

    def _tensors(self, path: str) -> dict[str, torch.Tensor]:
        block = self.model.get_submodule(path)
        parameters = dict(block.named_parameters(remove_duplicate=False))
        return {**parameters, **dict(block.named_buffers(remove_duplicate=False))}

    def _own(self, path: str) -> Mapping[int, str]:
        return {id(tensor): name for name, tensor in self._tensors(path).items()}


def _models_own(stack_trace: str | None) -> str | None:
    """A stack trace without the frames of the wrapper around a block."""
    frames = re.split(r'^(?=\s*File ")', stack_trace or "", flags=re.MULTILINE)
    return "".join(f for f in frames if f'"{blocks.__file__}"' not in f) or None


def _moved(stack: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """A module stack in which the first block's path is replaced."""

    def moved(text: str) -> str:
        head, found, tail = text.partition(old)
        return f"{head}{new}{tail}" if found and (not tail or tail[0] in ".@") else text

    return {moved(key): (moved(path), kind) for key, (path, kind) in stack.items()}


def _symbolic(node: fx.Node) -> bool:
    values = pytree.tree_leaves(node.meta.get("val"))
    sizes = [s for v in values if isinstance(v, torch.Tensor) for s in v.shape]
    return any(isinstance(v, (torch.SymInt, torch.SymFloat, torch.SymBool)) for v in [*values, *sizes])


def _value(node: fx.Node) -> list[Any]:
    values = pytree.tree_leaves(node.meta.get("val"))
    return [(v.shape, v.dtype, v.stride()) if isinstance(v, torch.Tensor) else v for v in values]


def _identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and not a.is_meta and torch.equal(a, b)
