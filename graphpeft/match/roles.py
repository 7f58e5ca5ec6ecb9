"""The roles, declared. Neither the matcher nor this file knows any architecture."""

from __future__ import annotations

from graphpeft.ir.site import Rows
from graphpeft.match import fused
from graphpeft.match.dataflow import Dataflow
from graphpeft.match.declaration import Declaration
from graphpeft.match.operators import activation, depthwise
from graphpeft.match.pattern import (
    FIXED,
    Bound,
    Match,
    affine,
    each,
    lookup,
    matmul,
    maybe,
    mul,
    sdpa,
    softmax,
    unbound,
)
from graphpeft.match.products import CONVOLUTIONS, op
from graphpeft.match.walk import elementwise, flow, join, mixed, seen


def apart(flow: Dataflow, match: Match) -> str | None:
    """Gate and up must be two projections, or separate rows of one: x · sigmoid(x) alone is not a gated MLP."""
    gate, up = match.bound["gate"], match.bound["up"]
    if len(gate) != 1 or len(up) != 1:
        return "gate and up are not one projection each"
    if gate[0].node is not up[0].node:
        return None
    one, other = (rows_of(flow, bound) for bound in (gate[0], up[0]))
    return "gate and up read the same features" if one == other else None


def rows_of(flow: Dataflow, bound: Bound) -> Rows | None:
    return fused.rows(flow, bound.node, bound.seen_from)


def single(flow: Dataflow, match: Match) -> str | None:
    return None if len(match.bound["up"]) == 1 else "the activation joins several projections"


def by_position(flow: Dataflow, match: Match) -> str | None:
    """An MLP projects each position by itself, and does not open with an activation before a depthwise convolution."""
    for bound in (b for bounds in match.bound.values() for b in bounds):
        if not flow.affines[bound.node].pointwise:
            return "a convolution wider than one position is no projection of an MLP"
        between = flow.between(bound.node, bound.seen_from)
        first = next((i for i, n in enumerate(between) if activation(n)), len(between))
        if any(depthwise(n) for n in between[first:]):
            return "an activation stands before a depthwise convolution: an inverted bottleneck"
    return None


def chooses_experts(flow: Dataflow, match: Match) -> str | None:
    """A router has an output for each stacked matrix, and for up to two shared or idle experts."""
    stacks = {a.weight.meta["val"].shape[0] for a in flow.affines.values() if a.kind == "experts"}
    scored = [b.node.meta["val"].shape[-1] for b in match.bound["router"]]
    fit = all(any(n <= s <= n + 2 for n in stacks) for s in scored)
    return None if stacks and fit else "it scores something else than stacked experts"


def linear(flow: Dataflow, match: Match) -> str | None:
    wide = any(flow.affines[b.node].kind == "conv" for bounds in match.bound.values() for b in bounds)
    return "it is a convolution" if wide else None


def private(flow: Dataflow, match: Match) -> str | None:
    """One projection, and otherwise only attention itself, reads a latent bottleneck."""
    for bound in match.bound["latent"]:
        readers = flow.readers(bound.node)
        if len(readers & flow.affines.keys()) != 1 or readers & flow.joins.keys():
            return "what it makes is read elsewhere too"
    return None


def added(flow: Dataflow, match: Match) -> str | None:
    """An operand may be the sum of several projections, but not their product: then one only modulates the other."""
    made = {b.node: b.seen_from for role in "qkv" for b in match.bound.get(role, ())}
    ways = [set(flow.between(node, operand)) for node, operand in made.items()]
    for node in set().union(*ways) if len(ways) > 1 else ():
        factors = flow.parents(node)
        behind = [{i for i, (n, way) in enumerate(zip(made, ways, strict=True)) if f is n or f in way} for f in factors]
        if op(node) in {"mul", "mul_"} and len(factors) == 2 and all(behind) and not behind[0] & behind[1]:
            return "it is the product of several projections"
    return None


def pooled(flow: Dataflow, match: Match) -> str | None:
    """A fixed query, as in pooling by a learned query, needs one projection each for keys and values."""
    if match.bound.get("q"):
        return None
    keys, values = (match.bound.get(role, ()) for role in "kv")
    if len({b.node for b in keys}) != 1 or len({b.node for b in values}) != 1:
        return "a fixed query reads the results of several projections"
    if keys[0].node is not values[0].node:
        return None
    one, other = (rows_of(flow, bounds[0]) for bounds in (keys, values))
    return "keys and values are the same features" if one == other else None


LATENT = maybe(flow(affine("latent")).where(private))
Q, K, V = (flow(affine(role, LATENT)).where(added) for role in "qkv")
SCORES = softmax(flow(matmul(Q, K))) | softmax(flow(matmul(FIXED, K)))
CORE = (sdpa(Q | FIXED, K, V) | matmul(flow(SCORES), V, commute=True)).where(pooled)

GATE, UP = elementwise(affine("gate"), activated=True), elementwise(affine("up"), activated=False)
GATED = affine("down", seen(mul(GATE, UP).where(apart)))
PLAIN = affine("down", elementwise(affine("up"), activated=True)).where(single)
MLP = join(flow((GATED | PLAIN).where(by_position)), bypassed="up")

SCORED = flow(affine("router"))

DECLARED = [
    Declaration(
        "attention",
        CORE,
        ("q", "k", "v", "latent"),
        "no attention core was found (no scaled_dot_product_attention, no softmax fed by a product of two projections)",
    ),
    Declaration(
        "attention output",
        affine("o", flow(unbound(CORE))),
        ("o",),
        "no projection reads what an attention core returns",
    ),
    Declaration(
        "mlp", MLP, ("gate", "up", "down"), "no residual bypasses two projections with an activation between them"
    ),
    Declaration(
        "mixer",
        join(flow(affine("mixer.out", mixed("mixer.in")).where(linear)), bypassed="mixer.in"),
        ("mixer.in", "mixer.out"),
        "no residual bypasses projections with a scan, a shift or a convolution of positions between them",
        rest=True,
    ),
    Declaration(
        "embedding", lookup("embed"), ("embed",), "no table is looked up by an input", frozenset({"embedding"})
    ),
    Declaration(
        "router",
        each((SCORED | flow(softmax(SCORED))).where(chooses_experts)),
        ("router",),
        "no projection is followed by a choice of the largest",
        frozenset({"topk", "sort", "argmax", "max"}),
        rest=True,
    ),
    Declaration(
        "head", each(flow(affine("head"))), ("head",), "no projection ends the model", frozenset({"output"}), rest=True
    ),
    Declaration(
        "convolution", affine("conv"), ("conv",), "there is no convolution of an activation", CONVOLUTIONS, rest=True
    ),
]
