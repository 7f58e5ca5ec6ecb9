"""A captured graph as the matcher sees it: which nodes are projections, attention products, residual joins.

Everything here is read off operators, operands and shapes. No module or parameter name is ever looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from graphpeft.program import Program, Rows, stored

PRODUCTS = frozenset({"linear", "addmm", "mm", "bmm", "matmul", "baddbmm", "einsum", "conv1d", "conv2d", "conv3d"})
ATTENTION = frozenset({"scaled_dot_product_attention"})
SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
ADD = frozenset({"add", "add_"})
# Operators that only rename, move or keep their first operand's values: what they return *is* that operand.
SAME = frozenset(
    {"to", "_to_copy", "type_as", "alias", "detach", "detach_", "contiguous", "clone", "dropout", "lift_fresh_copy"}
)
# Operators after which only part of a projection's output features may be left.
PARTIAL = frozenset(
    {"slice", "select", "split", "split_with_sizes", "chunk", "unbind", "index", "index_select", "narrow", "gather",
     "tensor_split", "getitem"}
)  # fmt: skip
# Point-wise, yet linear in the operand they are called on: not an activation function.
LINEAR_POINTWISE = frozenset(
    {"add", "add_", "sub", "mul", "mul_", "div", "neg", "clone", "where", "masked_fill", "rsub", "fill", "to", "clamp"}
)
RESHAPES = frozenset(
    {
        "view",
        "reshape",
        "unsqueeze",
        "squeeze",
        "flatten",
        "unflatten",
        "expand",
        "permute",
        "transpose",
        "getitem",
        "_unsafe_view",
    }
)
TRANSPOSES = frozenset({"t", "transpose", "permute", "numpy_T", "mT", "T"})


def op(node: fx.Node) -> str:
    """The operator's plain name, the same for `aten.linear.default`, `F.linear` and a method call."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return node.op
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1]
    return getattr(node.target, "__name__", str(node.target))


def pointwise(node: fx.Node) -> bool:
    """Whether the operator works element by element (torch's own tag says so)."""
    tagged = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return tagged or op(node) in {"hardswish", "silu", "selu", "softplus"}


def behind_transposes(node: fx.Node) -> tuple[fx.Node, int]:
    """The node behind transposes, casts and copies, and how many transposes there were."""
    flips = 0
    while node.args and isinstance(node.args[0], fx.Node):
        name = str(node.args[1]) if op(node) == "getattr" else op(node)
        if name not in TRANSPOSES | SAME:
            break
        flips += name in TRANSPOSES
        node = node.args[0]
    return node, flips


@dataclass(frozen=True)
class Affine:
    """A projection: `node` multiplies `input` by the parameter at `weight`."""

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    transposed: bool
    """The weight is stored (in, out) rather than (out, in)."""


def read_affine(node: fx.Node, is_weight: Callable[[fx.Node], bool]) -> Affine | None:
    """`node` as a product of an activation and a two-dimensional parameter, or `None`."""
    name = op(node)
    operands = [a for a in node.args if isinstance(a, fx.Node)]
    if name == "linear":
        x, w = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        stored_in_out = False
    elif name == "addmm" and len(node.args) >= 3:
        x, w = node.args[1], node.args[2]
        stored_in_out = True
    elif name in {"mm", "matmul"} and len(operands) == 2:
        x, w = operands
        stored_in_out = True
    else:
        return None
    if not (isinstance(x, fx.Node) and isinstance(w, fx.Node)):
        return None
    w, flips = behind_transposes(w)
    stored_in_out ^= flips % 2 == 1
    return Affine(node, x, w, stored_in_out) if is_weight(w) and x is not w else None


class Dataflow:
    """Queries over one captured graph. All are computed once and linear in the graph, or in one block of it."""

    def __init__(self, program: Program):
        self.program = program
        self.nodes = [n for n in program.graph.nodes if n.op in {"placeholder", "get_attr", "call_function"}]
        self.order = {n: i for i, n in enumerate(self.nodes)}
        self.probed: dict[Hashable, Rows | None] = {}
        """Answers of `fused.rows`, by what they depend on."""

    @cached_property
    def active(self) -> set[fx.Node]:
        """Nodes that depend on the values of the model's input, as opposed to its sizes, parameters and constants."""
        found: set[fx.Node] = set()
        for n in self.nodes:
            if isinstance(n.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)):
                continue
            if n.op == "placeholder":
                if n not in self.program.weights and n not in self.program.constants:
                    found.add(n)
            elif any(a in found for a in n.all_input_nodes):
                found.add(n)
        return found

    @cached_property
    def affines(self) -> dict[fx.Node, Affine]:
        """Every projection of an activation by a parameter, in graph order."""
        return {n: a for n in self.nodes if (a := self.read(n)) and a.input in self.active}

    @cached_property
    def calls(self) -> Counter[str]:
        """Per weight, the number of projections by it, of constants too."""
        return Counter(self.program.weights[a.weight] for n in self.nodes if (a := self.read(n)))

    def read(self, node: fx.Node) -> Affine | None:
        """`node` as a projection of anything, constants included, by a parameter that is a matrix."""
        found = read_affine(node, self.program.weights.__contains__)
        if found is None or stored(self.program.model, self.program.weights[found.weight]).dim() != 2:
            return None
        return found

    def barrier(self, node: fx.Node) -> bool:
        """Whether `flow` stops here: a product, a softmax, an attention core or a residual join."""
        return op(node) in PRODUCTS | ATTENTION | SOFTMAX or node in self.joins

    def parents(self, node: fx.Node) -> list[fx.Node]:
        return [p for p in node.all_input_nodes if p in self.active]

    def upstream(
        self, start: fx.Node, through: Callable[[fx.Node], bool] = lambda n: True
    ) -> Iterator[tuple[fx.Node, ...]]:
        """Paths from `start` up to each nearest node that stops the flow, `start` first, nearest first.

        A barrier stops it, and so does a node that does not pass `through`."""
        came_from: dict[fx.Node, fx.Node | None] = {start: None}
        queue = [start]
        for node in queue:
            if not self.barrier(node) and through(node):
                for parent in self.parents(node):
                    if parent not in came_from:
                        came_from[parent] = node
                        queue.append(parent)
                continue
            path: list[fx.Node] = []
            step: fx.Node | None = node
            while step is not None:
                path.append(step)
                step = came_from[step]
            yield tuple(reversed(path))

    def between(self, start: fx.Node, end: fx.Node) -> list[fx.Node]:
        """Nodes on any path from `start` (exclusive) to `end` (inclusive), in graph order."""
        reach = {start}
        low, high = self.order[start], self.order[end]
        for node in self.nodes[low + 1 : high + 1]:
            if any(p in reach for p in node.all_input_nodes):
                reach.add(node)
        needed = self.ancestors(end, low) | {end}
        return [n for n in self.nodes[low + 1 : high + 1] if n in reach and n in needed]

    def ancestors(self, node: fx.Node, floor: int, stop: Callable[[fx.Node], bool] = lambda n: False) -> set[fx.Node]:
        """Active ancestors of `node` no earlier than graph position `floor`, not looking behind nodes that `stop`."""
        seen: set[fx.Node] = set()
        queue = [node]
        for n in queue:
            if stop(n):
                continue
            for p in self.parents(n):
                if p not in seen and self.order[p] >= floor:
                    seen.add(p)
                    queue.append(p)
        return seen

    @cached_property
    def joins(self) -> dict[fx.Node, tuple[fx.Node, fx.Node]]:
        """Residual joins: an addition of an earlier activation (the bypass) to work that was made from it (the branch).

        Every way from the bypass to the branch leads through a product, which sets a join apart from the additions
        inside an activation function, such as x + 0.0447 x³ in the tanh form of GELU. And the first product reads the
        bypass as the input of a projection, which sets it apart from a mask or position bias that each layer adds."""
        found: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        for node in self.nodes:
            if op(node) not in ADD or node not in self.active:
                continue
            pair = sorted(
                {strip(a) for a in node.args[:2] if isinstance(a, fx.Node) and a in self.active},
                key=self.order.__getitem__,
            )
            if len(pair) != 2:
                continue
            # Parallel branches: (x + f(x)) + g(x) joins g(x) to the bypass of the inner sum.
            inner = [(found[one][0], other) for one, other in (pair, pair[::-1]) if one in found]
            for bypass, branch in ((pair[0], pair[1]), *inner):
                if self._bypasses(bypass, branch):
                    found[node] = (bypass, branch)
                    break
        return found

    def _bypasses(self, early: fx.Node, late: fx.Node) -> bool:
        def product(n: fx.Node) -> bool:
            return op(n) in PRODUCTS | ATTENTION

        floor = self.order[early]
        if early in self.ancestors(late, floor, stop=product):
            return False
        made_from = self.ancestors(late, floor) | {late}
        return early in made_from and any(self._projects(n, early, floor) for n in made_from)

    def _projects(self, node: fx.Node, source: fx.Node, floor: int) -> bool:
        """Whether `node` multiplies `source`, seen through nothing but normalization and the like, by a parameter."""
        if op(node) not in PRODUCTS or not any(
            behind_transposes(w)[0] in self.program.weights for w in node.all_input_nodes
        ):
            return False
        inputs = self.parents(node)
        return source in inputs or any(source in self.ancestors(x, floor, stop=self._mixes) for x in inputs)

    @staticmethod
    def _mixes(node: fx.Node) -> bool:
        return op(node) in PRODUCTS | ATTENTION | SOFTMAX

    def reads(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether `node` is `source` seen through normalization, casts and the like (nothing that `flow` stops at)."""
        start, source = strip(node), strip(source)
        if start is source:
            return True
        return source in self.ancestors(start, self.order[source], stop=self.barrier)


def strip(node: fx.Node) -> fx.Node:
    """The node behind casts, copies, dropout and other operators that return the values they were given."""
    while op(node) in SAME and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def partial(nodes: Iterable[fx.Node]) -> bool:
    return any(op(n) in PARTIAL for n in nodes)


def activation(node: fx.Node) -> bool:
    """Whether the operator is a non-linear point-wise function of one activation."""
    return pointwise(node) and op(node) not in LINEAR_POINTWISE
