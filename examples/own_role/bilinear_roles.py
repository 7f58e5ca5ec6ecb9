"""The roles of a bilinear block, x + fold(left(x) * right(x)): a gated MLP without its activation."""

from graphpeft.match import Dataflow, Declaration, Match, affine, elementwise, flow, join, mul, seen


def two(flow: Dataflow, match: Match) -> str | None:
    """Two projections are multiplied: one by itself is a square, and no bilinear form."""
    return None if len({bound.node for bound in match.bound["factor"]}) == 2 else "a projection is multiplied by itself"


FACTOR = elementwise(affine("factor"), activated=False)
BLOCK = join(flow(affine("fold", seen(mul(FACTOR, FACTOR).where(two)))), bypassed="factor")
MISSING = "no residual bypasses a product of two projections that have no activation"
BILINEAR = Declaration("bilinear block", BLOCK, ("factor", "fold"), MISSING)
