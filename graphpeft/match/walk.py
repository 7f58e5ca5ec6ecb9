"""Patterns that look further than one node: they walk upstream to the nearest barriers, or around a residual."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from graphpeft.match import dataflow as df
from graphpeft.match import operators as ops
from graphpeft.match.pattern import Bound, Match, Miss, Pattern, Result
from graphpeft.match.products import CONVOLUTIONS, PRODUCTS, SAME, op

_EACH = SAME | ops.RESHAPES | ops.PARTIAL | ops.NORMS | ops.REDUCTIONS


@dataclass(frozen=True)
class Flow(Pattern):
    """`pattern` matches at one or more of the nearest barriers upstream, whatever lies between."""

    pattern: Pattern

    def at(self, flow: df.Dataflow, node: fx.Node) -> Result:
        total: Match | None = None
        best = Miss(node, "nothing upstream stops the flow")
        for path in flow.upstream(node):
            result = self.pattern.at(flow, path[-1])
            if isinstance(result, Miss):
                best = max(best, result.deeper(), key=lambda m: m.depth)
            else:
                total = (total or Match()) + _seen_from(node, path[-1], result)
        return best if total is None else total


@dataclass(frozen=True)
class Elementwise(Pattern):
    """`pattern` matches at all of the nearest barriers upstream, and only work within each position lies between
    (element-wise operators, normalization, reshaping) or depthwise convolutions. `activated` requires (True) or forbids
    (False) a non-linear function there."""

    pattern: Pattern
    activated: bool | None = None

    def at(self, flow: df.Dataflow, node: fx.Node) -> Result:
        total = Match()
        for path in flow.upstream(node, self._through):
            result = self.pattern.at(flow, path[-1])
            if isinstance(result, Miss):
                return result.deeper()
            total = total + _seen_from(node, path[-1], result)
        ends = {bound.node for bounds in total.bound.values() for bound in bounds}
        if not ends <= {path[-1] for path in flow.upstream(node, self._by_position)}:
            return Miss(node, "it is summed up over the positions on the way", 1)
        active = any(ops.activation(n) for end in ends for n in flow.between(end, node))
        if self.activated is not None and active is not self.activated:
            return Miss(node, "a non-linear function is " + ("in the way" if active else "missing"), 1)
        return total

    @classmethod
    def _by_position(cls, node: fx.Node) -> bool:
        """As `_through`, but no reduction over positions: a global norm may only scale what other paths bring."""
        return cls._through(node) and (op(node) not in ops.REDUCTIONS or ops.per_position(node))

    @staticmethod
    def _through(node: fx.Node) -> bool:
        return ops.pointwise(node) or ops.depthwise(node) or op(node) in _EACH


def _seen_from(node: fx.Node, end: fx.Node, result: Match) -> Match:
    """The match, with `node` recorded as the operand that the projection at `end` feeds."""
    return Match(
        {
            name: tuple(replace(b, seen_from=node) if b.node is end else b for b in bounds)
            for name, bounds in result.bound.items()
        }
    )


@dataclass(frozen=True)
class Seen(Pattern):
    """`pattern` matches behind copies, reshapes, fixed factors and normalization."""

    pattern: Pattern

    def at(self, flow: df.Dataflow, node: fx.Node) -> Result:
        return self.pattern.at(flow, flow.carried(node))


@dataclass(frozen=True)
class Join(Pattern):
    """A residual join whose branch matches; `bypassed` names the projection that must read the bypass."""

    branch: Pattern
    bypassed: str

    def at(self, flow: df.Dataflow, node: fx.Node) -> Result:
        if node not in flow.joins:
            return Miss(node, "not a residual join")
        bypass, branch = flow.joins[node]
        result = self.branch.at(flow, branch)
        if isinstance(result, Miss):
            return result.deeper()
        for bound in result.bound[self.bypassed]:
            read = flow.affines[bound.node].input
            if not flow.reads(read, bypass):
                return Miss(bound.node, "the residual does not bypass this projection", 98, failed=True)
            beside = flow.ancestors(read, flow.order[bypass] + 1, stop=flow.barrier) & flow.affines.keys()
            if any(flow.affines[n].kind == "conv" and not ops.depthwise(n) for n in beside):
                return Miss(bound.node, "it reads a convolution beside what bypasses it", 98, failed=True)
        return result


@dataclass(frozen=True)
class Mixed(Pattern):
    """Before the next residual join upstream, a scan, a shift, a convolution or a product of two activations mixes
    positions, and no attention core does. Binds the projections at which this work begins."""

    name: str

    def at(self, flow: df.Dataflow, node: fx.Node) -> Result:
        inside = flow.ancestors(node, 0, stop=flow.joins.__contains__) - flow.joins.keys()
        inside.add(node)
        if any(op(n) in ops.ATTENTION for n in inside):
            return Miss(node, "an attention core mixes the positions", 1)
        if not any(self._mixes(flow, n) for n in inside):
            return Miss(node, "nothing mixes positions upstream", 1)
        projections = [n for n in inside if n in flow.affines]
        opening = [n for n in projections if not self._made_from(flow, n, inside)]
        if not opening:
            return Miss(node, "no projection opens it", 2)
        return Match({self.name: tuple(Bound(n, n) for n in sorted(opening, key=flow.order.__getitem__))})

    @staticmethod
    def _mixes(flow: df.Dataflow, node: fx.Node) -> bool:
        if op(node) in ops.MIXING:
            return True
        if op(node) in PRODUCTS and node not in flow.affines:
            return flow.read(node) is None
        return op(node) in CONVOLUTIONS and not flow.affines[node].pointwise

    @staticmethod
    def _made_from(flow: df.Dataflow, node: fx.Node, inside: set[fx.Node]) -> bool:
        behind = flow.ancestors(flow.affines[node].input, 0, stop=flow.joins.__contains__) | {flow.affines[node].input}
        return any(n in flow.affines for n in behind & inside)


def flow(pattern: Pattern) -> Pattern:
    return Flow(pattern)


def elementwise(pattern: Pattern, activated: bool | None = None) -> Pattern:
    return Elementwise(pattern, activated)


def seen(pattern: Pattern) -> Pattern:
    return Seen(pattern)


def join(branch: Pattern, bypassed: str) -> Pattern:
    return Join(branch, bypassed)


def mixed(name: str) -> Pattern:
    return Mixed(name)
