"""A captured graph as the matcher sees it: which nodes are projections, attention products, residual joins.

Everything here is derived from operators, operands and shapes, never from the names of modules or parameters. (The
pattern `Lookup` looks at the names of the model's inputs, to tell tokens from position and segment ids.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from functools import cached_property

import torch
from torch import fx

from graphpeft.ir.program import Program
from graphpeft.ir.site import Rows
from graphpeft.match.operators import (
    ADD,
    ATTENTION,
    BARRIERS,
    FRESH,
    LIKE,
    NORMS,
    RESHAPES,
    depthwise,
    floating,
    strip,
)
from graphpeft.match.products import MATMULS, PRODUCTS, Affine, behind_transposes, op, read_affine


class Dataflow:
    """Queries over one captured graph. Each is computed once, in time linear in the graph or in one of its blocks."""

    def __init__(self, program: Program):
        self.program = program
        self.nodes = [n for n in program.graph.nodes if n.op in {"placeholder", "get_attr", "call_function", "output"}]
        self.order = {n: i for i, n in enumerate(self.nodes)}
        self.probed: dict[Hashable, Rows | None] = {}
        """Answers of `fused.rows`, keyed by everything that they depend on."""

    @cached_property
    def first_paths(self) -> dict[int, str]:
        """The first path of every module, by its identity."""
        return {id(module): path for path, module in self.program.model.named_modules()}

    @cached_property
    def active(self) -> set[fx.Node]:
        """Nodes that depend on the values of the model's input, as opposed to its sizes, parameters and constants."""
        found: set[fx.Node] = set()
        for n in self.nodes:
            if isinstance(n.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)) or op(n) in FRESH:
                continue
            if n.op == "placeholder":
                if n not in self.program.weights and n not in self.program.constants:
                    found.add(n)
            elif any(a in found for a in n.all_input_nodes):
                found.add(n)
        return found

    @cached_property
    def affines(self) -> dict[fx.Node, Affine]:
        """Every projection of an activation by a parameter, in graph order, if an output of the model depends on it."""
        return {n: a for n in self.nodes if n in self.useful and (a := self.read(n)) and a.input in self.active}

    @cached_property
    def useful(self) -> set[fx.Node]:
        """Nodes that an output depends on."""
        found = {n for n in self.nodes if n.op == "output"}
        for n in reversed(self.nodes):
            if n in found:
                found.update(n.all_input_nodes)
        return found

    @cached_property
    def calls(self) -> Counter[str]:
        """For each weight, the number of nodes that project by it, constants included, or look entries up in it."""
        uses = [a.weight for a in self._read.values()] + list(self.tables.values())
        return Counter(self.program.weights[weight] for weight in uses)

    def read(self, node: fx.Node) -> Affine | None:
        """`node` as a projection of anything, constants included, by a parameter."""
        return self._read.get(node)

    @cached_property
    def _read(self) -> dict[fx.Node, Affine]:
        return {n: a for n in self.nodes if (a := read_affine(n, self.program.weights.__contains__))}

    @cached_property
    def tables(self) -> dict[fx.Node, fx.Node]:
        """Embeddings that an output depends on, each with the parameter in which it looks entries up."""
        looked = {n: behind_transposes(n.args[0])[0] for n in self.nodes if op(n) == "embedding" and n in self.useful}
        return {n: table for n, table in looked.items() if table in self.program.weights}

    def anchors(self, operators: frozenset[str] | None) -> list[fx.Node]:
        """The nodes with these operators, or with `None` those where flow stops. Only what an output depends on."""
        if operators is None:
            return self._barriers
        return [n for n in self.nodes if op(n) in operators and n in self.useful]

    @cached_property
    def _barriers(self) -> list[fx.Node]:
        return [n for n in self.nodes if n in self.useful and self.barrier(n)]

    def barrier(self, node: fx.Node) -> bool:
        """Whether `flow` stops here: a product, a softmax, an attention core or a residual join."""
        return self.mixes(node) or node in self.joins

    @staticmethod
    def mixes(node: fx.Node) -> bool:
        return op(node) in BARRIERS and not depthwise(node)

    def parents(self, node: fx.Node) -> list[fx.Node]:
        """The node's active inputs, without indices, masks and operands that only give a size or dtype."""
        if op(node) in LIKE:
            return [p for p in node.all_input_nodes[:1] if p in self.active]
        return [p for p in node.all_input_nodes if p in self.active and floating(p)]

    def upstream(
        self, start: fx.Node, through: Callable[[fx.Node], bool] = lambda n: True
    ) -> Iterator[tuple[fx.Node, ...]]:
        """Paths from `start` up to each nearest node that stops the flow, `start` first, nearest first.

        The flow stops at a barrier, and at a node that `through` rejects.
        """
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

    def readers(self, start: fx.Node) -> set[fx.Node]:
        """The nearest nodes downstream of `start` that stop the flow."""
        found: set[fx.Node] = set()
        seen, queue = {start}, [start]
        for node in queue:
            for user in node.users:
                if user in seen or user not in self.useful or not floating(user):
                    continue
                seen.add(user)
                if self.barrier(user) or user.op == "output":
                    found.add(user)
                else:
                    queue.append(user)
        return found

    def origins(self, node: fx.Node) -> set[fx.Node]:
        """The sources of an activation: the nearest nodes upstream that stop the flow or have no parents."""
        found: set[fx.Node] = set()
        seen, queue = {node}, [node]
        for n in queue:
            before = [] if self.barrier(n) else self.parents(n)
            if not before:
                found.add(n)
            queue += [p for p in before if p not in seen]
            seen.update(before)
        return found

    def between(self, start: fx.Node, end: fx.Node) -> list[fx.Node]:
        """Nodes on the paths of flow from `start` (exclusive) to `end` (inclusive), in graph order.

        Paths through another projection or an attention core do not count.
        """
        reach = {start}
        low, high = self.order[start], self.order[end]
        for node in self.nodes[low + 1 : high + 1]:
            if any(p in reach for p in node.all_input_nodes) and (node is end or not self.barrier(node)):
                reach.add(node)
        needed = self.ancestors(end, low, stop=lambda n: n is not end and self.barrier(n)) | {end}
        return [n for n in self.nodes[low + 1 : high + 1] if n in reach and n in needed]

    def ancestors(self, node: fx.Node, floor: int, stop: Callable[[fx.Node], bool] = lambda n: False) -> set[fx.Node]:
        """Active ancestors of `node` at graph position `floor` or later, except behind nodes where `stop` is true."""
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
        """Residual joins: an addition of an earlier activation (the bypass) to a result computed from it (the branch).

        Every path from the bypass to the branch leads through a product. This distinguishes a join from the additions
        inside an activation function, such as x + 0.0447 x³ in the tanh form of GELU. And a projection reads the bypass
        as its input, before any other product. This distinguishes a join from a mask or a position bias that each layer
        adds.
        """
        found: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        for node in self.nodes:
            if op(node) not in ADD or node not in self.active:
                continue
            pair = sorted(
                {self.unscaled(a) for a in node.args[:2] if isinstance(a, fx.Node) and a in self.active},
                key=self.order.__getitem__,
            )
            if len(pair) != 2:
                continue
            # Parallel branches: (x + f(x)) + g(x) joins g(x) to the bypass of the inner sum.
            inner = [(found[one][0], other) for one, other in (pair, pair[::-1]) if one in found]
            # Hyper-connections: mix(x) + f(x), where a product with weights computed from x mixes several streams.
            inner += [(p, other) for one, other in (pair, pair[::-1]) if self._mixture(one) for p in self.parents(one)]
            for bypass, branch in ((pair[0], pair[1]), *inner):
                if self._bypasses(bypass, branch):
                    found[node] = (bypass, branch)
                    break
        return found

    def _mixture(self, node: fx.Node) -> bool:
        """Whether the node multiplies two activations."""
        return op(node) in MATMULS and len(self.parents(node)) == 2

    def _bypasses(self, early: fx.Node, late: fx.Node) -> bool:
        def product(n: fx.Node) -> bool:
            return op(n) in PRODUCTS | ATTENTION and not depthwise(n)

        floor = self.order[early]
        if early in self.ancestors(late, floor, stop=product):
            return False
        made_from = self.ancestors(late, floor) | {late}
        return early in made_from and any(self._projects(n, early, floor) for n in made_from)

    def _projects(self, node: fx.Node, source: fx.Node, floor: int) -> bool:
        """Whether `node` projects `source` by a parameter, directly or after normalization and the like."""
        found = None if depthwise(node) else self.read(node)
        if found is None:
            return False
        return source is found.input or source in self.ancestors(found.input, floor, stop=self.mixes)

    def unscaled(self, node: fx.Node) -> fx.Node:
        """The activation behind casts, copies, dropout, and factors and offsets that do not depend on the input."""
        while True:
            node = strip(node)
            factors = [a for a in node.all_input_nodes if a in self.active]
            if op(node) not in {"mul", "mul_", "div", "div_", "add", "add_", "sub"} or len(factors) != 1:
                return node
            node = factors[0]

    def carried(self, node: fx.Node) -> fx.Node:
        """The activation behind all that keeps its features: copies, reshapes, fixed factors, normalization."""
        while True:
            behind_it = self.unscaled(node)
            if op(behind_it) in RESHAPES | NORMS and isinstance(behind_it.args[0], fx.Node):
                behind_it = behind_it.args[0]
            elif op(behind_it) in {"mul", "mul_", "div", "div_", "sub"}:
                behind_it = self._normalized(behind_it) or behind_it
            if behind_it is node:
                return node
            node = behind_it

    def _normalized(self, node: fx.Node) -> fx.Node | None:
        """x, if the node is x times, over or minus a number per position that is computed from an activation."""
        x, factor = (*node.args, None, None)[:2]
        for one, other in ((x, factor), (factor, x)):
            if isinstance(one, fx.Node) and isinstance(other, fx.Node) and other in self.active:
                made = other.meta.get("val")
                if made is not None and made.dim() and made.shape[-1] == 1 and one.meta["val"].shape[-1] != 1:
                    return one
        return None

    def reads(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether `node` is `source` after normalization, casts and the like (nothing that stops the flow)."""
        start, source = strip(node), strip(source)
        if start is source:
            return True
        return source in self.ancestors(start, self.order[source], stop=self.barrier)
