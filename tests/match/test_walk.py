"""Patterns that look further than one node: flow, element-wise work, residual joins, mixing of positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphpeft.capturing.capture import capture
from graphpeft.capturing.normalize import normalize
from graphpeft.ir.program import Program
from graphpeft.match.dataflow import Dataflow
from graphpeft.match.find import find
from graphpeft.match.pattern import Match, Miss, Pattern, affine, matmul, softmax
from graphpeft.match.products import op
from graphpeft.match.walk import elementwise, flow, join, mixed, seen

X = torch.randn(2, 5, 8)
Combine = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """Projections a to d of one width, a norm and two convolutions of each channel, combined as `combine` says."""

    def __init__(self, combine: Combine) -> None:
        super().__init__()
        self.combine = combine
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(8)
        self.each, self.wide = nn.Conv1d(8, 8, 3, padding=1, groups=8), nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(self, x)


def program(combine: Combine) -> Program:
    return normalize(capture(Net(combine).eval(), (X,)))


def match(pattern: Pattern, combine: Combine) -> tuple[Dataflow, Match | Miss]:
    graph = Dataflow(program(combine))
    output = next(n for n in graph.program.graph.nodes if n.op == "output")
    return graph, pattern.at(graph, output.args[0][0])


def names(pattern: Pattern, combine: Combine) -> dict[str, list[str]] | str:
    """The modules bound to each name, or the reason of the miss."""
    graph, result = match(pattern, combine)
    if isinstance(result, Miss):
        return result.reason
    weights = graph.program.weights
    return {n: [weights[graph.affines[b.node].weight][0] for b in bs] for n, bs in result.bound.items()}


def roles(combine: Combine) -> dict[str, str]:
    return {s.weight.removesuffix(".weight"): s.role for s in find(program(combine)).sites}


def test_flow_takes_any_work_and_stops_at_the_nearest() -> None:
    assert names(flow(affine("x")), lambda m, x: m.b(m.a(x)).cumsum(1).mean(1).exp()) == {"x": ["b"]}
    assert names(flow(affine("x")), lambda m, x: torch.cat([m.a(x), m.b(x) * m.c(x)], -1)) == {"x": ["a", "b", "c"]}


def test_flow_is_satisfied_by_one_way_of_several() -> None:
    assert names(flow(affine("x")), lambda m, x: m.a(x) + torch.softmax(m.b(x), -1)) == {"x": ["a"]}
    assert names(elementwise(affine("x")), lambda m, x: m.a(x) + torch.softmax(m.b(x), -1)) == (
        "softmax is not a projection by a parameter"
    )


def test_what_was_found_remembers_the_operand_it_was_seen_from() -> None:
    graph, result = match(softmax(flow(matmul(flow(affine("q")), flow(affine("k"))))), lambda m, x: torch.softmax(
        torch.tanh((m.a(x) * 2) @ m.b(x).relu().mT), -1))  # fmt: skip
    assert isinstance(result, Match)
    ((q,), (k,)) = result.bound["q"], result.bound["k"]
    assert op(q.seen_from) == "mul"
    assert graph.between(q.node, q.seen_from)[-1] is q.seen_from
    assert op(graph.between(k.node, k.seen_from)[0]) == "relu"


ELEMENTWISE: dict[str, tuple[Combine, bool]] = {
    "activation": (lambda m, x: F.gelu(m.a(x)), True),
    "reshaped and copied": (lambda m, x: m.a(x).unflatten(-1, (2, 4)).flatten(-2).contiguous(), True),
    "a norm": (lambda m, x: m.norm(m.a(x)), True),
    "a norm that is written out": (lambda m, x: (y := m.a(x)) * torch.rsqrt(y.pow(2).mean(-1, True) + 1e-6), True),
    "a convolution of each channel": (lambda m, x: m.each(m.a(x).transpose(1, 2)).transpose(1, 2), True),
    "a convolution": (
        lambda m, x: m.wide(m.a(x).transpose(1, 2)).transpose(1, 2),
        True,
    ),  # it is itself a projection, and the nearest
    "shifted": (lambda m, x: m.a(x).roll(1, 1), False),
    "padded": (lambda m, x: F.pad(m.a(x), (0, 0, 1, 0)), False),
    "scanned": (lambda m, x: m.a(x).cumsum(1), False),
    "joined with the input": (lambda m, x: x + m.a(x), False),
}


@pytest.mark.parametrize(("combine", "good"), ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_elementwise_work_is_on_each_position_alone(combine: Combine, good: bool) -> None:
    assert isinstance(match(elementwise(affine("x")), combine)[1], Match) is good


SPELLINGS: dict[str, Combine] = {
    "mT": lambda m, x: m.each(m.a(x).mT).mT,
    "where with a number": lambda m, x: torch.where((y := m.a(x)) > 0, y, 0.0),
}


@pytest.mark.parametrize("combine", SPELLINGS.values(), ids=SPELLINGS)
def test_other_spellings_of_elementwise_work(combine: Combine) -> None:
    assert isinstance(match(elementwise(affine("x")), combine)[1], Match)


def test_pooling_over_positions_is_no_work_on_each() -> None:
    """Squeeze and excitation: one vector for all positions, added to each."""
    found = roles(lambda m, x: x + m.b(torch.relu(m.a(x).mean(1, keepdim=True))))
    assert not {"up", "down"} & set(found.values())


def test_an_activation_counts_on_any_of_the_ways() -> None:
    swish: Combine = lambda m, x: (y := m.a(x)) * torch.sigmoid(y)  # noqa: E731
    assert names(elementwise(affine("x"), activated=True), swish) == {"x": ["a"]}
    assert names(elementwise(affine("x"), activated=False), swish) == "a non-linear function is in the way"
    assert (
        names(elementwise(affine("x"), activated=True), lambda m, x: m.a(x) * 2) == "a non-linear function is missing"
    )


def test_seen_looks_through_what_keeps_features() -> None:
    pattern = seen(affine("x"))
    assert names(pattern, lambda m, x: m.norm(m.a(x)).view(-1, 8) * 0.5) == {"x": ["a"]}
    assert names(pattern, lambda m, x: torch.relu(m.a(x))) == "relu is not a projection by a parameter"


def test_a_join_asks_that_the_bypass_is_read() -> None:
    branch = join(flow(affine("down", elementwise(affine("up")))), bypassed="up")
    assert names(branch, lambda m, x: x + m.b(torch.relu(m.a(m.norm(x))))) == {"down": ["b"], "up": ["a"]}
    assert names(branch, lambda m, x: torch.relu(x)) == "not a residual join"
    late: Combine = lambda m, x: (y := m.c(x)) + m.b(torch.relu(m.a(torch.tanh(m.d(y)))))  # noqa: E731
    assert names(branch, late) == "the residual does not bypass this projection"
    assert names(branch, lambda m, x: x + m.a(x)) == "placeholder is not a projection by a parameter"


MIXERS: dict[str, Combine] = {
    "a scan": lambda m, x: x + m.b(m.a(x).cumsum(1)),
    "a shift": lambda m, x: x + m.b(torch.tanh(m.a(x).roll(1, 1))),
    "a convolution of positions": lambda m, x: x + m.b(m.each(m.a(x).mT).mT * m.c(x)),
    "linear attention": lambda m, x: x + m.b((y := F.elu(m.a(x))) @ (y.mT @ y)),
    "a scan behind a norm": lambda m, x: x + m.b(m.norm(m.a(m.norm(x)).cumsum(1))),
}


@pytest.mark.parametrize("combine", MIXERS.values(), ids=MIXERS)
def test_what_mixes_positions_without_attention(combine: Combine) -> None:
    found = roles(combine)
    assert (found["a"], found["b"]) == ("mixer.in", "mixer.out")


NO_MIXERS: dict[str, Combine] = {
    "an mlp": lambda m, x: x + m.b(torch.relu(m.a(x))),
    "attention": lambda m, x: x + m.b(torch.softmax(m.a(x) @ m.c(x).mT, -1) @ m.d(x)),
    "no residual": lambda m, x: m.b(m.a(x).cumsum(1)),
    "position by position": lambda m, x: x + m.b(m.a(x) * torch.sigmoid(m.c(x))),
}


@pytest.mark.parametrize("combine", NO_MIXERS.values(), ids=NO_MIXERS)
def test_what_is_no_mixer(combine: Combine) -> None:
    assert not {r for r in roles(combine).values() if r.startswith("mixer")}


def test_a_mixer_binds_the_projections_that_open_it_and_misses_with_a_reason() -> None:
    pattern = affine("out", mixed("in"))
    two: Combine = lambda m, x: m.d((m.a(x) * torch.sigmoid(m.b(x))).cumsum(1) + m.c(m.a(x)))  # noqa: E731
    assert names(pattern, two) == {"out": ["d"], "in": ["a", "b", "a"]}
    assert names(pattern, lambda m, x: m.d(torch.tanh(m.a(x)))) == "nothing mixes positions upstream"
    assert names(pattern, lambda m, x: m.d(x.cumsum(1))) == "no projection opens it"
    assert names(pattern, lambda m, x: m.d(F.scaled_dot_product_attention(m.a(x), m.b(x), m.c(x)))) == (
        "an attention core mixes the positions"
    )


def test_lending_a_type_is_no_flow() -> None:
    """Granite's router ends in `gates.type_as(x)`: x lends its type, and does not reach the sum past the projections."""
    found = roles(lambda m, x: x + m.b(torch.relu(m.a(x))) * torch.sigmoid(m.c(x)).type_as(x))
    assert (found["a"], found["b"]) == ("up", "down")
