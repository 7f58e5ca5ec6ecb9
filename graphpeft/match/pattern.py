"""The pattern language: small values that describe how an activation was made, read from its user upwards.

    ATTENTION = sdpa(Q, K, V) | matmul(flow(softmax(flow(matmul(Q, K)))), V)

A pattern is matched at a node and looks upstream only. It gives a `Match` (what was bound to which name) or a
`Miss` (how far it came, at which node it stopped, and why). Reasons are formatted only when they are printed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import fx

from graphpeft.match import dataflow as df


@dataclass(frozen=True)
class Bound:
    """A projection that a pattern found, and the node downstream of it at which the pattern's operand begins."""

    node: fx.Node
    seen_from: fx.Node


@dataclass(frozen=True)
class Match:
    bound: dict[str, tuple[Bound, ...]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return True

    def __add__(self, other: Match) -> Match:
        names = [*self.bound, *(n for n in other.bound if n not in self.bound)]
        return Match({n: self.bound.get(n, ()) + other.bound.get(n, ()) for n in names})


@dataclass(frozen=True)
class Miss:
    """Why a pattern does not match. `depth` counts the steps that did, so that near misses can be ranked."""

    node: fx.Node
    reason: str
    depth: int = 0

    def __bool__(self) -> bool:
        return False

    def deeper(self) -> Miss:
        return replace(self, depth=self.depth + 1)


Result = Match | Miss


class Pattern:
    """Base of all patterns. `p | q` tries p first, then q."""

    def at(self, flow: df.Dataflow, node: fx.Node) -> Result:
        raise TypeError(f"{type(self).__name__} is not a complete pattern: give it an `at` method")

    def __or__(self, other: Pattern) -> Pattern:
        return Either(self, other)

    def where(self, condition: Callable[[df.Dataflow, Match], str | None]) -> Pattern:
        """Narrow the pattern: `condition` returns the reason to decline, or `None` to accept."""
        return Where(self, condition)


@dataclass(frozen=True)
class Either(Pattern):
    first: Pattern
    second: Pattern

    def at(self, flow: df.Dataflow, node: fx.Node) -> Result:
        first = self.first.at(flow, node)
        if first:
            return first
        second = self.second.at(flow, node)
        if isinstance(first, Miss) and isinstance(second, Miss):
            return first if first.depth > second.depth else second
        return second


@dataclass(frozen=True)
class Where(Pattern):
    pattern: Pattern
    condition: Callable[[df.Dataflow, Match], str | None]

    def at(self, flow: df.Dataflow, node: fx.Node) -> Result:
        result = self.pattern.at(flow, node)
        if isinstance(result, Match) and (reason := self.condition(flow, result)):
            return Miss(node, reason, 99)
        return result


@dataclass(frozen=True)
class Anything(Pattern):
    def at(self, flow: df.Dataflow, node: fx.Node) -> Result:
        return Match()


@dataclass(frozen=True)
class Op(Pattern):
    """One operator; `operands` are matched against its tensor operands from `skip` on, in either order if `commute`."""

    names: frozenset[str]
    operands: tuple[Pattern, ...] = ()
    commute: bool = False

    def at(self, flow: df.Dataflow, node: fx.Node) -> Result:
        if df.op(node) not in self.names:
            return Miss(node, f"{df.op(node)} is not {' or '.join(sorted(self.names))}")
        nodes = operands(node)
        if len(nodes) < len(self.operands):
            return Miss(node, f"{df.op(node)} has {len(nodes)} tensor operands")
        result = self._match(flow, nodes)
        if not result and self.commute:
            return self._match(flow, nodes[::-1]) or result
        return result

    def _match(self, flow: df.Dataflow, nodes: list[fx.Node]) -> Result:
        total = Match()
        for pattern, operand in zip(self.operands, nodes, strict=False):
            result = pattern.at(flow, operand)
            if isinstance(result, Miss):
                return result.deeper()
            total = total + result
        return total


def operands(node: fx.Node) -> list[fx.Node]:
    """The two factors of a product, or every tensor operand of another operator."""
    args = node.args[1:] if df.op(node) in {"baddbmm", "addmm", "einsum"} else node.args
    flat = [b for a in args for b in (a if isinstance(a, (list, tuple)) else [a])]
    return [a for a in flat if isinstance(a, fx.Node)]


@dataclass(frozen=True)
class AffineOp(Pattern):
    """A projection, bound to `name`; `reads` is matched at its input."""

    name: str
    reads: Pattern = Anything()

    def at(self, flow: df.Dataflow, node: fx.Node) -> Result:
        found = flow.affines.get(node)
        if found is None:
            return Miss(node, f"{df.op(node)} is not a projection by a parameter")
        result = self.reads.at(flow, found.input)
        if isinstance(result, Miss):
            return result.deeper()
        return Match({self.name: (Bound(node, node),)}) + result


@dataclass(frozen=True)
class Flow(Pattern):
    """`pattern` holds at one or more of the nearest barriers upstream, whatever work lies between."""

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
    """`pattern` holds at the nearest barriers upstream, at all of them, and only element-wise work and reshaping lie
    between; `activated` asks for (True) or forbids (False) a non-linear function among it."""

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
        active = any(df.activation(n) for end in ends for n in flow.between(end, node))
        if self.activated is not None and active is not self.activated:
            return Miss(node, "a non-linear function is " + ("in the way" if active else "missing"), 1)
        return total

    @staticmethod
    def _through(node: fx.Node) -> bool:
        return df.pointwise(node) or df.op(node) in df.SAME | df.RESHAPES | df.PARTIAL


def _seen_from(node: fx.Node, end: fx.Node, result: Match) -> Match:
    """The match with `node` noted as the operand that the projection found at `end` flows into."""
    return Match(
        {
            name: tuple(replace(b, seen_from=node) if b.node is end else b for b in bounds)
            for name, bounds in result.bound.items()
        }
    )


@dataclass(frozen=True)
class Seen(Pattern):
    """`pattern` holds behind copies, casts, dropout and reshapes."""

    pattern: Pattern

    def at(self, flow: df.Dataflow, node: fx.Node) -> Result:
        while df.op(node) in df.SAME | df.RESHAPES and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        return self.pattern.at(flow, node)


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
            if not flow.reads(flow.affines[bound.node].input, bypass):
                return Miss(bound.node, "the residual does not bypass this projection", 98)
        return result


ANY = Anything()


def affine(name: str, reads: Pattern = ANY) -> Pattern:
    return AffineOp(name, reads)


def flow(pattern: Pattern) -> Pattern:
    return Flow(pattern)


def elementwise(pattern: Pattern, activated: bool | None = None) -> Pattern:
    return Elementwise(pattern, activated)


def seen(pattern: Pattern) -> Pattern:
    return Seen(pattern)


def join(branch: Pattern, bypassed: str) -> Pattern:
    return Join(branch, bypassed)


def sdpa(*operands: Pattern) -> Pattern:
    return Op(df.ATTENTION, operands)


def softmax(scores: Pattern) -> Pattern:
    return Op(df.SOFTMAX, (scores,))


def matmul(left: Pattern, right: Pattern) -> Pattern:
    return Op(frozenset({"matmul", "bmm", "baddbmm", "einsum", "mm"}), (left, right))


def mul(left: Pattern, right: Pattern) -> Pattern:
    """An element-wise product, in either order."""
    return Op(frozenset({"mul", "mul_"}), (left, right), commute=True)
