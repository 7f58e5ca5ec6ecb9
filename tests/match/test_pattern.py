"""The pattern language: what it finds, what it declines, and how it says why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphpeft.capturing.capture import capture
from graphpeft.capturing.normalize import normalize
from graphpeft.ir.program import Program
from graphpeft.match.dataflow import Dataflow
from graphpeft.match.find import find
from graphpeft.match.pattern import (
    ANY,
    FIXED,
    Match,
    Miss,
    Pattern,
    affine,
    each,
    lookup,
    matmul,
    maybe,
    mul,
    softmax,
    unbound,
)
from graphpeft.match.products import op
from graphpeft.match.walk import elementwise, flow, seen

X = torch.randn(2, 5, 8)


class Net(nn.Module):
    """Projections a to d of one width, combined as `combine` says."""

    def __init__(self, combine: object) -> None:
        super().__init__()
        self.combine = combine
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(self, x)  # type: ignore[operator]


def program(combine: object) -> Program:
    return normalize(capture(Net(combine).eval(), (X,)))


def match(pattern: Pattern, combine: object) -> Match | Miss:
    """The pattern at the node that the model returns."""
    graph = Dataflow(program(combine))
    output = next(n for n in graph.program.graph.nodes if n.op == "output")
    return pattern.at(graph, output.args[0][0])


def bound(result: Match | Miss) -> dict[str, int]:
    assert isinstance(result, Match), result
    return {name: len(found) for name, found in result.bound.items()}


def roles(combine: object) -> dict[str, str]:
    return {s.weight.removesuffix(".weight"): s.role for s in find(program(combine)).sites}


def test_affine_binds_its_name_and_reads_its_input() -> None:
    assert bound(match(affine("x"), lambda m, x: m.a(x))) == {"x": 1}
    assert bound(match(affine("y", flow(affine("x"))), lambda m, x: m.b(torch.relu(m.a(x))))) == {"y": 1, "x": 1}
    miss = match(affine("y", affine("x")), lambda m, x: m.b(torch.relu(m.a(x))))
    assert isinstance(miss, Miss)
    assert miss.reason == "relu is not a projection by a parameter"
    assert miss.depth == 1


def test_flow_gathers_every_nearest_projection() -> None:
    assert bound(match(flow(affine("x")), lambda m, x: m.a(x) * torch.tanh(m.b(x)))) == {"x": 2}
    miss = match(flow(affine("x")), lambda m, x: torch.tanh(x))
    assert isinstance(miss, Miss)
    assert miss.reason == "nothing upstream stops the flow"


def test_elementwise_work_excludes_what_mixes_features() -> None:
    assert bound(match(elementwise(affine("x")), lambda m, x: m.a(x).view(-1, 8) * 2)) == {"x": 1}
    assert bound(match(elementwise(affine("x")), lambda m, x: m.norm(m.a(x)))) == {"x": 1}
    for mixes in (
        lambda m, x: m.a(x).cumsum(1),
        lambda m, x: m.a(x).roll(1, 1),
        lambda m, x: F.pad(m.a(x), (0, 0, 1, 0)),
    ):
        assert not match(elementwise(affine("x")), mixes)
        assert bound(match(flow(affine("x")), mixes)) == {"x": 1}
    activated = elementwise(affine("x"), activated=True)
    assert bound(match(activated, lambda m, x: F.gelu(m.a(x)))) == {"x": 1}
    miss = match(activated, lambda m, x: m.a(x) * 3)
    assert isinstance(miss, Miss)
    assert "non-linear" in miss.reason
    assert not match(elementwise(affine("x"), activated=False), lambda m, x: F.gelu(m.a(x)))


def test_alternatives_and_the_deeper_of_two_misses() -> None:
    either = softmax(affine("x")) | matmul(ANY, affine("x"))
    assert bound(match(either, lambda m, x: torch.softmax(m.a(x), -1))) == {"x": 1}
    miss = match(either, lambda m, x: torch.softmax(torch.relu(m.a(x)), -1))
    assert isinstance(miss, Miss)
    assert miss.reason == "relu is not a projection by a parameter"


def test_conditions_decline_with_their_reason() -> None:
    picky = affine("x").where(lambda flow, found: "not today")
    miss = match(picky, lambda m, x: m.a(x))
    assert isinstance(miss, Miss)
    assert miss.reason == "not today"
    assert bound(match(affine("x").where(lambda flow, found: None), lambda m, x: m.a(x))) == {"x": 1}


def test_a_product_commutes() -> None:
    gate, up = elementwise(affine("gate"), activated=True), elementwise(affine("up"), activated=False)
    for combine in (lambda m, x: F.silu(m.a(x)) * m.b(x), lambda m, x: m.b(x) * F.silu(m.a(x))):
        result = match(mul(gate, up), combine)
        assert bound(result) == {"gate": 1, "up": 1}
    assert bound(match(seen(mul(gate, up)), lambda m, x: F.dropout(m.b(x) * F.silu(m.a(x)), 0.1, False))) == {
        "gate": 1,
        "up": 1,
    }


def test_an_incomplete_pattern_says_so() -> None:
    class Half(Pattern):
        pass

    with pytest.raises(TypeError, match="Half is not a complete pattern"):
        match(Half(), lambda m, x: m.a(x))


MLPS = {
    "plain": (lambda m, x: x + m.b(F.gelu(m.a(m.norm(x)))), {"a": "up", "b": "down"}),
    "with dropout": (
        lambda m, x: x + F.dropout(m.b(F.dropout(F.relu(m.a(x)), 0.1, False)), 0.1, False),
        {"a": "up", "b": "down"},
    ),
    "norm after": (lambda m, x: m.norm(m.b(torch.tanh(m.a(x))) + x), {"a": "up", "b": "down"}),
    "squared relu": (lambda m, x: x + m.b(F.relu(m.a(x)) ** 2), {"a": "up", "b": "down"}),
    "gelu spelled out": (
        lambda m, x: x + m.b((y := m.a(x)) * 0.5 * (1 + torch.tanh(0.8 * (y + 0.04 * y**3)))),
        {"a": "up", "b": "down"},
    ),
    "swish spelled out": (lambda m, x: x + m.b((y := m.a(x)) * torch.sigmoid(y)), {"a": "up", "b": "down"}),
    "gated": (lambda m, x: x + m.c(F.silu(m.a(x)) * m.b(x)), {"a": "gate", "b": "up", "c": "down"}),
    "gated, other order": (lambda m, x: x + m.c(m.b(x) * torch.sigmoid(m.a(x))), {"a": "gate", "b": "up", "c": "down"}),
    "no residual": (lambda m, x: m.b(F.gelu(m.a(x))), {"a": "other", "b": "head"}),
    "no activation": (lambda m, x: x + m.b(m.a(x)), {"a": "other", "b": "other"}),
    "residual around one layer only": (lambda m, x: (y := m.a(x)) + m.b(F.gelu(y)), {"a": "other", "b": "other"}),
    "a head after a residual": (lambda m, x: m.b(torch.tanh(m.a(x + m.c(x)))), {"a": "other", "b": "head", "c": "other"}),
}  # fmt: skip


@pytest.mark.parametrize(("combine", "expected"), MLPS.values(), ids=MLPS.keys())
def test_feed_forward_blocks(combine: object, expected: dict[str, str]) -> None:
    assert roles(combine) == expected


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / 3, -1) @ v


SCORES = {
    "plain": lambda m, x: m.d(attend(m.a(x), m.b(x), m.c(x))),
    "sdpa": lambda m, x: m.d(F.scaled_dot_product_attention(m.a(x), m.b(x), m.c(x))),
    "soft-capped": lambda m, x: m.d(torch.softmax(5 * torch.tanh(m.a(x) @ m.b(x).mT / 5), -1) @ m.c(x)),
    "masked and biased": lambda m, x: m.d(
        torch.softmax((m.a(x) @ m.b(x).mT + torch.ones(5, 5)).masked_fill(torch.eye(5) > 0, -9.0), -1) @ m.c(x)
    ),
    "normalized queries": lambda m, x: m.d(attend(m.norm(m.a(x)), m.norm(m.b(x)), m.c(x))),
    "rotated": lambda m, x: m.d(attend(torch.cat([-m.a(x)[..., 4:], m.a(x)[..., :4]], -1), m.b(x), m.c(x))),
    "with a sink": lambda m, x: m.d(
        torch.softmax(torch.cat([m.a(x) @ m.b(x).mT, torch.zeros(2, 5, 1)], -1), -1)[..., :-1] @ m.c(x)
    ),
    "dropped out": lambda m, x: m.d(F.dropout(torch.softmax(m.a(x) @ m.b(x).mT, -1), 0.1, False) @ m.c(x)),
}


@pytest.mark.parametrize("combine", SCORES.values(), ids=SCORES.keys())
def test_attention_in_every_spelling(combine: object) -> None:
    assert roles(combine) == {"a": "q", "b": "k", "c": "v", "d": "o"}


NOT_ATTENTION = {
    "no softmax": lambda m, x: m.d(m.a(x) @ m.b(x).mT @ m.c(x)),
    "a classifier": lambda m, x: torch.softmax(m.a(x), -1),
    "a gate over features": lambda m, x: torch.softmax(m.a(x), -1) * m.b(x),
}


@pytest.mark.parametrize("combine", NOT_ATTENTION.values(), ids=NOT_ATTENTION.keys())
def test_what_is_no_attention(combine: object) -> None:
    assert set(roles(combine).values()) <= {"other", "head"}


def test_the_nearest_miss_is_kept() -> None:
    misses = find(program(lambda m, x: m.d(torch.softmax(x @ m.b(x).mT, -1) @ m.c(x)))).misses
    assert (misses["attention"].node.name, misses["attention"].reason) == ("x", "nothing upstream stops the flow")
    misses = find(program(lambda m, x: m.d(torch.sigmoid(m.a(x) @ m.b(x).mT) @ m.c(x)))).misses
    assert "is not" in misses["attention"].reason
    assert "softmax" in misses["attention"].reason
    assert "mlp" in find(program(lambda m, x: m.b(F.gelu(m.a(x))))).misses
    assert find(program(lambda m, x: x + m.b(m.a(x)))).misses["mlp"].reason == "a non-linear function is missing"


def test_maybe_unbound_and_each() -> None:
    both = affine("y", maybe(affine("x")))
    assert bound(match(both, lambda m, x: m.b(m.a(x)))) == {"y": 1, "x": 1}
    assert bound(match(both, lambda m, x: m.b(torch.tanh(m.a(x))))) == {"y": 1}
    assert bound(match(affine("y", unbound(affine("x"))), lambda m, x: m.b(m.a(x)))) == {"y": 1}
    miss = match(affine("y", unbound(affine("x"))), lambda m, x: m.b(x))
    assert isinstance(miss, Miss)
    assert (miss.depth, miss.reason) == (2, "placeholder is not a projection by a parameter")
    assert bound(match(each(affine("x")), lambda m, x: m.a(x) * torch.tanh(x))) == {"x": 1}
    assert bound(match(each(affine("x")), lambda m, x: m.a(x) * m.b(x))) == {"x": 2}
    assert not match(each(affine("x")), lambda m, x: torch.tanh(m.a(x)) * x)
    assert not match(each(affine("x")), lambda m, x: x * 2)


def test_fixed_is_what_no_input_reaches() -> None:
    scores = matmul(FIXED, ANY)
    assert match(scores, lambda m, x: m.a.weight @ x.mT)
    miss = match(scores, lambda m, x: x @ x.mT)
    assert isinstance(miss, Miss)
    assert miss.reason == "it depends on the model's input"


def test_a_lookup_is_of_an_input_itself() -> None:
    class Words(nn.Module):
        def __init__(self, ids: object) -> None:
            super().__init__()
            self.table, self.ids = nn.Embedding(16, 8), ids

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(self.ids(ids))  # type: ignore[operator]

    def result(ids: object) -> Match | Miss:
        graph = Dataflow(normalize(capture(Words(ids).eval(), (torch.randint(0, 9, (2, 5)),))))
        return lookup("embed").at(graph, next(n for n in graph.nodes if op(n) == "embedding"))

    assert bound(result(lambda ids: ids)) == {"embed": 1}
    assert bound(result(lambda ids: ids.view(-1, 5).contiguous())) == {"embed": 1}
    for positions in (lambda ids: (ids != 0).long().cumsum(1), lambda ids: torch.arange(ids.shape[1])):
        assert not result(positions)
