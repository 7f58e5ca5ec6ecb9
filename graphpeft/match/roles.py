"""The roles, declared. The matcher behind them knows no architecture, and neither does this file."""

from __future__ import annotations

from dataclasses import dataclass

from graphpeft.match import fused
from graphpeft.match.dataflow import Dataflow
from graphpeft.match.pattern import (
    ANY,
    Match,
    Pattern,
    affine,
    elementwise,
    flow,
    join,
    matmul,
    mul,
    sdpa,
    seen,
    softmax,
)


@dataclass(frozen=True)
class Declaration:
    """A pattern and the roles that it binds. `absent` says in words what is missing where it matches nowhere."""

    name: str
    pattern: Pattern
    roles: tuple[str, ...]
    absent: str


def from_input(flow: Dataflow, match: Match) -> str | None:
    """Both factors of the scores come from the model's input: position tables are projected too, and are no keys."""
    missing = [role for role in "qk" if not match.bound.get(role)]
    return f"no projection of an activation makes the {' and '.join(missing)} operand" if missing else None


def apart(flow: Dataflow, match: Match) -> str | None:
    """Gate and up are two projections, or separate rows of one: x · sigmoid(x) alone is no gated MLP."""
    gate, up = match.bound["gate"], match.bound["up"]
    if len(gate) != 1 or len(up) != 1:
        return "gate and up are not one projection each"
    if gate[0].node is not up[0].node:
        return None
    one, other = (fused.rows(flow, x.node, x.seen_from) for x in (gate[0], up[0]))
    return "gate and up read the same features" if one == other else None


def single(flow: Dataflow, match: Match) -> str | None:
    return None if len(match.bound["up"]) == 1 else "the activation joins several projections"


Q, K, V = flow(affine("q")), flow(affine("k")), flow(affine("v"))
SCORES = matmul(Q, K).where(from_input)
CORE = sdpa(Q, K, V) | matmul(flow(softmax(flow(SCORES))), V)
ATTENDED = sdpa() | matmul(flow(softmax(flow(matmul(ANY, ANY)))), ANY)

GATE, UP = elementwise(affine("gate"), activated=True), elementwise(affine("up"), activated=False)
GATED_MLP = join(flow(affine("down", seen(mul(GATE, UP).where(apart)))), bypassed="up")
MLP = join(flow(affine("down", elementwise(affine("up"), activated=True)).where(single)), bypassed="up")

DECLARED: list[Declaration] = [
    Declaration(
        "attention",
        CORE,
        ("q", "k", "v"),
        "no attention core was found (no scaled_dot_product_attention, no softmax fed by a product of two projections)",
    ),
    Declaration(
        "attention output", affine("o", flow(ATTENDED)), ("o",), "no projection reads what an attention core returns"
    ),
    Declaration(
        "mlp",
        GATED_MLP | MLP,
        ("gate", "up", "down"),
        "no residual bypasses two projections with an activation between them",
    ),
]
ROLES = tuple(role for declaration in DECLARED for role in declaration.roles)
