"""A captured graph as the matcher sees it: which nodes are projections, attention products, residual joins.

Everything here is read off operators, operands and shapes. No module or parameter name is ever looked at.
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
    """Queries over one captured graph. All are computed once and linear in the graph, or in one block of it."""

    def __init__(self, program: Program):
        self.program = program
        self.nodes = [n for n in program.graph.nodes if n.op in {"placeholder", "get_attr", "call_function", "output"}]
        self.order = {n: i for i, n in enumerate(self.nodes)}
        self.probed: dict[Hashable, Rows | None] = {}
        """Answers of `fused.rows`, by what they depend on."""

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
        """Every projection of an activation by a parameter that an output of the model depends on, in graph order."""
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
        """Per weight, the number of nodes that use it as a projection, of constants too, or look entries up in it."""
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
        """Embeddings that an output depends on, and the parameter each looks entries up in."""
        looked = {n: behind_transposes(n.args[0])[0] for n in self.nodes if op(n) == "embedding" and n in self.useful}
        return {n: table for n, table in looked.items() if table in self.program.weights}

    def anchors(self, operators: frozenset[str] | None) -> list[fx.Node]:
        """The nodes of these operators; without any, those where flow stops. Only what an output depends on."""
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
        """What the node computes with: its active inputs, indices, masks and what lends but its size or type left out."""
        if op(node) in LIKE:
            return [p for p in node.all_input_nodes[:1] if p in self.active]
        return [p for p in node.all_input_nodes if p in self.active and floating(p)]

    def upstream(
        self, start: fx.Node, through: Callable[[fx.Node], bool] = lambda n: True
    ) -> Iterator[tuple[fx.Node, ...]]:
        """Paths from `start` up to each nearest node that stops the flow, `start` first, nearest first.

        A barrier stops it, and so does a node that does not pass `with_transforms`."""
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
        """Where an activation comes from: the nearest nodes upstream that stop the flow, or that nothing flows into."""
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
        """Nodes on the ways that flow takes from `start` (exclusive) to `end` (inclusive), in graph order.

        A way through another projection or an attention core is none."""
        reach = {start}
        low, high = self.order[start], self.order[end]
        for node in self.nodes[low + 1 : high + 1]:
            if any(p in reach for p in node.all_input_nodes) and (node is end or not self.barrier(node)):
                reach.add(node)
        needed = self.ancestors(end, low, stop=lambda n: n is not end and self.barrier(n)) | {end}
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
                {self.unscaled(a) for a in node.args[:2] if isinstance(a, fx.Node) and a in self.active},
                key=self.order.__getitem__,
            )
            if len(pair) != 2:
                continue
            # Parallel branches: (x + f(x)) + g(x) joins g(x) to the bypass of the inner sum.
            inner = [(found[one][0], other) for one, other in (pair, pair[::-1]) if one in found]
            # Hyper-connections: mix(x) + f(x), where a product with weights made from x mixes several streams.
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
        """Whether `node` multiplies `source`, seen through nothing but normalization and the like, by a parameter."""
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
        """The activation behind all that keeps its features: copies, reshapes, fixed factors and normalization."""
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
        """x, where the node is x times, over or minus a number per position that is made from x itself."""
        x, factor = (*node.args, None, None)[:2]
        for one, other in ((x, factor), (factor, x)):
            if isinstance(one, fx.Node) and isinstance(other, fx.Node) and other in self.active:
                made = other.meta.get("val")
                if made is not None and made.dim() and made.shape[-1] == 1 and one.meta["val"].shape[-1] != 1:
                    return one
        return None

    def reads(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether `node` is `source` seen through normalization, casts and the like (nothing that `flow` stops at)."""
        start, source = strip(node), strip(source)
        if start is source:
            return True
        return source in self.ancestors(start, self.order[source], stop=self.barrier)
