"""The pattern language: small values that describe how an activation was computed, read from its user upward.

    ATTENTION = sdpa(Q, K, V) | matmul(flow(softmax(flow(matmul(Q, K)))), V)

A pattern is matched at a node and looks upstream only. The result is a `Match` (what was bound to which name) or a
`Miss` (how far the match got, at which node it stopped, and why).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import fx

from graphpeft.match import dataflow as df
from graphpeft.match import operators as ops
from graphpeft.match.fused import UnknownRowsError
from graphpeft.match.products import op


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
    """Why a pattern does not match. `depth` counts the steps that matched, which ranks near misses."""

    node: fx.Node
    reason: str
    depth: int = 0
    failed: bool = False
    """The structure matched, but a condition on it failed."""

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
            return first if first.depth >= second.depth else second
        return second


@dataclass(frozen=True)
class Where(Pattern):
    pattern: Pattern
    condition: Callable[[df.Dataflow, Match], str | None]

    def at(self, flow: df.Dataflow, node: fx.Node) -> Result:
        result = self.pattern.at(flow, node)
        if isinstance(result, Miss):
            return result
        try:
            reason = self.condition(flow, result)
        except UnknownRowsError as error:
            reason = str(error)
        if reason:
            return Miss(node, reason, 99, failed=True)
        return result


@dataclass(frozen=True)
class Anything(Pattern):
    def at(self, flow: df.Dataflow, node: fx.Node) -> Result:
        return Match()


@dataclass(frozen=True)
class Op(Pattern):
    """One operator; `operands` are matched against its first tensor operands, in either order if `commute`."""

    names: frozenset[str]
    operands: tuple[Pattern, ...] = ()
    commute: bool = False

    def at(self, flow: df.Dataflow, node: fx.Node) -> Result:
        if op(node) not in self.names:
            wanted = sorted(name for name in self.names if not name.startswith("_"))
            return Miss(node, f"{op(node)} is not {' or '.join(wanted)}")
        nodes = operands(node)
        if len(nodes) < len(self.operands):
            return Miss(node, f"{op(node)} has {len(nodes)} tensor operands")
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
    args = node.args[1:] if op(node) in {"baddbmm", "addmm", "einsum"} else node.args
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
            return Miss(node, f"{op(node)} is not a projection by a parameter")
        result = self.reads.at(flow, found.input)
        if isinstance(result, Miss):
            return result.deeper()
        return Match({self.name: (Bound(node, node),)}) + result


@dataclass(frozen=True)
class Maybe(Pattern):
    """`pattern` matches, or nothing is bound."""

    pattern: Pattern

    def at(self, flow: df.Dataflow, node: fx.Node) -> Result:
        return self.pattern.at(flow, node) or Match()


@dataclass(frozen=True)
class Each(Pattern):
    """`pattern` matches at one or more of the tensor operands."""

    pattern: Pattern

    def at(self, flow: df.Dataflow, node: fx.Node) -> Result:
        results = [self.pattern.at(flow, operand) for operand in operands(node)]
        total = sum((r for r in results if isinstance(r, Match)), Match())
        misses = [r.deeper() for r in results if isinstance(r, Miss)]
        return total if len(misses) < len(results) else max(misses, key=lambda m: m.depth, default=Miss(node, "empty"))


@dataclass(frozen=True)
class Unbound(Pattern):
    """`pattern` matches, but its bindings are dropped: they belong to another pattern."""

    pattern: Pattern

    def at(self, flow: df.Dataflow, node: fx.Node) -> Result:
        result = self.pattern.at(flow, node)
        return result.deeper() if isinstance(result, Miss) else Match()


@dataclass(frozen=True)
class Fixed(Pattern):
    """An operand that does not depend on the model's input, such as a learned query."""

    def at(self, flow: df.Dataflow, node: fx.Node) -> Result:
        return Miss(node, "it depends on the model's input") if node in flow.active else Match()


@dataclass(frozen=True)
class Lookup(Pattern):
    """An embedding table, bound to `name`, whose entries are selected directly by the model's input."""

    name: str

    def at(self, flow: df.Dataflow, node: fx.Node) -> Result:
        ids = [a for a in node.all_input_nodes if a in flow.active]
        source = flow.carried(ids[0]) if ids else node
        # Position and segment ids are inputs too, but not tokens; only the name of the input distinguishes them.
        if node not in flow.tables or source.op != "placeholder" or re.search("position|type", source.name):
            return Miss(node, "the entries looked up are not the tokens of an input of the model")
        return Match({self.name: (Bound(node, node),)})


ANY = Anything()
FIXED = Fixed()


def affine(name: str, reads: Pattern = ANY) -> Pattern:
    return AffineOp(name, reads)


def maybe(pattern: Pattern) -> Pattern:
    return Maybe(pattern)


def unbound(pattern: Pattern) -> Pattern:
    return Unbound(pattern)


def lookup(name: str) -> Pattern:
    return Lookup(name)


def each(pattern: Pattern) -> Pattern:
    return Each(pattern)


def sdpa(*operands: Pattern) -> Pattern:
    return Op(ops.ATTENTION, operands)


def softmax(scores: Pattern) -> Pattern:
    return Op(ops.SOFTMAX, (scores,))


def matmul(left: Pattern, right: Pattern, commute: bool = False) -> Pattern:
    return Op(frozenset({"matmul", "bmm", "baddbmm", "einsum", "mm"}), (left, right), commute)


def mul(left: Pattern, right: Pattern) -> Pattern:
    """An element-wise product, in either order."""
    return Op(frozenset({"mul", "mul_"}), (left, right), commute=True)
