"""The pattern language for declaring roles of your own: one import, described in docs/patterns.md."""

from graphpeft.match.dataflow import Dataflow
from graphpeft.match.declaration import Declaration
from graphpeft.match.pattern import (
    ANY,
    FIXED,
    Bound,
    Match,
    Miss,
    Op,
    Pattern,
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
from graphpeft.match.registry import register
from graphpeft.match.walk import elementwise, flow, join, mixed, seen

__all__ = [
    "ANY",
    "FIXED",
    "Bound",
    "Dataflow",
    "Declaration",
    "Match",
    "Miss",
    "Op",
    "Pattern",
    "affine",
    "each",
    "elementwise",
    "flow",
    "join",
    "lookup",
    "matmul",
    "maybe",
    "mixed",
    "mul",
    "register",
    "sdpa",
    "seen",
    "softmax",
    "unbound",
]
