"""What a graph says about itself: projections, residual joins, barriers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from graphpeft.capturing.capture import capture
from graphpeft.capturing.normalize import normalize
from graphpeft.match.dataflow import Dataflow
from graphpeft.match.operators import activation
from graphpeft.match.products import behind_transposes, op, read_affine


def flow(model: nn.Module, *inputs: Tensor) -> Dataflow:
    return Dataflow(normalize(capture(model.eval(), inputs or (torch.randn(2, 5, 8),))))


class Weighted(nn.Module):
    """One bare matrix, used as `use` says."""

    def __init__(self, use: object, shape: tuple[int, ...] = (8, 8)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(shape[0]))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)  # type: ignore[operator]


USES = {
    "linear": (lambda m, x: F.linear(x, m.weight), False),
    "linear with bias": (lambda m, x: F.linear(x, m.weight, m.bias), False),
    "matmul": (lambda m, x: x @ m.weight, True),
    "matmul with the transpose": (lambda m, x: x @ m.weight.T, False),
    "matmul with a permutation": (lambda m, x: x @ m.weight.permute(1, 0), False),
    "twice transposed": (lambda m, x: x @ m.weight.T.T, True),
    "addmm": (lambda m, x: torch.addmm(m.bias, x.flatten(0, 1), m.weight), True),
    "mm": (lambda m, x: torch.mm(x.flatten(0, 1), m.weight.t()), False),
    "copied and cast": (lambda m, x: x.double() @ m.weight.clone().double(), True),
}


@pytest.mark.parametrize(("use", "transposed"), USES.values(), ids=USES.keys())
def test_projections_in_every_spelling(use: object, transposed: bool) -> None:
    found = list(flow(Weighted(use)).affines.values())
    assert len(found) == 1
    assert found[0].transposed is transposed


NO_PROJECTIONS = {
    "an embedding": lambda m, x: F.embedding((x > 0).long(), m.weight).sum(-1),
    "element-wise": lambda m, x: x * m.weight[0],
    "a gram matrix": lambda m, x: x + (m.weight @ m.weight).sum(),
    "of constants alone": lambda m, x: x + F.linear(torch.ones(5, 8), m.weight),
    "dead code": lambda m, x: (F.linear(x, m.weight), x + m.bias)[1],
    "some columns": lambda m, x: F.linear(x[..., :4], m.weight[:, :4]),
    "a normalized weight": lambda m, x: F.linear(x, F.normalize(m.weight)),
    "by each channel alone": lambda m, x: F.conv1d(x.mT, m.weight[:, None, :3], groups=8),
}


@pytest.mark.parametrize("use", NO_PROJECTIONS.values(), ids=NO_PROJECTIONS.keys())
def test_what_is_no_projection(use: object) -> None:
    assert not flow(Weighted(use)).affines


class Residual(nn.Module):
    def __init__(self, combine: object) -> None:
        super().__init__()
        self.combine = combine
        self.one, self.two, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(self, x)  # type: ignore[operator]


JOINS = {
    "plain": (lambda m, x: x + m.one(x), 1),
    "branch first": (lambda m, x: m.one(x) + x, 1),
    "behind a norm": (lambda m, x: x + m.one(m.norm(x)), 1),
    "after a norm": (lambda m, x: m.norm(x + m.one(x)), 1),
    "through dropout and a cast": (lambda m, x: x + F.dropout(m.one(x), 0.1, False).to(torch.float32), 1),
    "two in a row": (lambda m, x: (y := x + m.one(x)) + m.two(y), 2),
    "parallel": (lambda m, x: m.one(x) + m.two(x) + x, 1),
    "two projections, no bypass": (lambda m, x: m.one(x) + m.two(x), 0),
    "inside an activation": (lambda m, x: torch.tanh(x + 0.04 * x**3), 0),
    "position embedding": (lambda m, x: m.one(x + torch.arange(8.0)), 0),
}


@pytest.mark.parametrize(("combine", "count"), JOINS.values(), ids=JOINS.keys())
def test_residual_joins(combine: object, count: int) -> None:
    assert len(flow(Residual(combine)).joins) == count


def test_a_join_knows_its_bypass_from_its_branch() -> None:
    found = flow(Residual(lambda m, x: F.dropout(m.one(m.norm(x)), 0.1, False) + x))
    ((bypass, branch),) = found.joins.values()
    assert bypass.op == "placeholder"
    assert op(branch) == "linear"


def test_upstream_stops_at_the_nearest_barriers() -> None:
    found = flow(Residual(lambda m, x: torch.relu(m.two(torch.sigmoid(m.one(x)))) * 2))
    (path,) = found.upstream(found.nodes[-1])
    assert [op(n) for n in path] == ["output", "mul", "relu", "linear"]
    assert found.affines[path[-1]].node is path[-1]


def test_between_holds_the_nodes_on_the_way() -> None:
    found = flow(Residual(lambda m, x: torch.relu((y := m.one(x)) * y) + m.two(x).sum()))
    start = next(iter(found.affines))
    end = next(n for n in found.nodes if op(n) == "relu")
    assert [op(n) for n in found.between(start, end)] == ["mul", "relu"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("relu", True),
        ("gelu", True),
        ("silu", True),
        ("tanh", True),
        ("sigmoid", True),
        ("hardswish", True),
        ("neg", False),
    ],
)
def test_activations(name: str, expected: bool) -> None:
    function = getattr(F, name, None) or getattr(torch, name)
    found = flow(Residual(lambda m, x: function(m.one(x))))
    node = next(n for n in reversed(found.nodes) if n.op == "call_function")
    assert activation(node) is expected


def test_reading_works_on_symbolic_traces_too() -> None:
    """Owners are traced with `torch.fx`, whose graphs hold functions and methods instead of ATen operators."""

    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)

    graph = fx.symbolic_trace(Conv1D()).graph
    found = [a for n in graph.nodes if (a := read_affine(n, lambda w: w.target == "weight"))]
    assert len(found) == 1
    assert found[0].transposed
    graph = fx.symbolic_trace(Weighted(lambda m, x: x @ m.weight.T)).graph
    (found,) = [a for n in graph.nodes if (a := read_affine(n, lambda w: w.target == "weight"))]
    assert not found.transposed
    product = next(n for n in graph.nodes if op(n) == "matmul")
    behind, flips = behind_transposes(product.args[1])
    assert (behind.target, flips) == ("weight", 1)


def test_sizes_indices_and_masks_are_no_activations() -> None:
    """What a tensor lends but its shape or type, or picks entries with, carries nothing of it."""

    def combine(m: Residual, x: Tensor) -> Tensor:
        fresh = torch.zeros_like(x) + x.new_ones(8)
        picked = m.one(fresh)[:, x.argmax(2)[0]]
        return torch.where(x > 0, m.two(x), picked)

    found = flow(Residual(combine))
    assert [a.weight.name for a in found.affines.values()] == ["p_two_weight"]
    where = next(n for n in found.nodes if op(n) == "where")
    assert [op(p) for p in found.parents(where)] == ["linear", "index"]
    assert not found.parents(found.parents(where)[1])


def test_what_no_output_depends_on_is_not_seen() -> None:
    """torch.export drops most dead code itself; a graph that somebody edited may hold some."""
    program = normalize(capture(Residual(lambda m, x: m.two(torch.relu(m.one(x)))).eval(), (torch.randn(2, 5, 8),)))
    output = next(n for n in program.graph.nodes if n.op == "output")
    (result,) = output.args[0]
    relu = result.args[0]
    output.args = ((relu,),)
    assert result in program.graph.nodes
    found = Dataflow(program)
    assert [a.weight.name for a in found.affines.values()] == ["p_one_weight"]
    assert found.anchors(frozenset({"linear"})) == list(found.affines)
    assert found.readers(next(iter(found.affines))) == {output}


def test_uses_of_a_weight_are_counted_as_table_and_as_head() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(torch.tanh(self.table(ids)), self.table.weight)

    found = flow(Shared(), torch.randint(0, 11, (2, 5)))
    assert found.calls == {"table.weight": 2}
    ((node, table),) = found.tables.items()
    assert (op(node), table.name) == ("embedding", "p_table_weight")


def test_readers_are_the_nearest_barriers_downstream() -> None:
    found = flow(Residual(lambda m, x: m.two(torch.relu(y := m.one(x))) + y.argmax(-1, True)))
    start = next(iter(found.affines))
    assert sorted(op(n) for n in found.readers(start)) == ["linear"]
    found = flow(Residual(lambda m, x: torch.softmax(y := m.one(x), -1) * m.two(torch.tanh(y))))
    assert sorted(op(n) for n in found.readers(next(iter(found.affines)))) == ["linear", "softmax"]


def test_a_convolution_of_each_channel_is_transparent() -> None:
    class Depthwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.conv = nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv1d(8, 8, 3, padding=1, groups=8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.two(torch.relu(self.conv(self.one(x).mT).mT))

    found = flow(Depthwise())
    conv = next(n for n in found.nodes if op(n) == "conv1d")
    assert not found.barrier(conv)
    relu = next(n for n in found.nodes if op(n) == "relu")
    assert [op(path[-1]) for path in found.upstream(relu)] == ["linear"]
    assert len(found.joins) == 1


NORMS = {
    "rms": lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "layer": lambda m, x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt(),
    "module": lambda m, x: m.norm(x),
    "scaled copies": lambda m, x: (x * 0.5).contiguous().view(2, -1).double() - 1.0,
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_what_keeps_features_is_seen_through(norm: object) -> None:
    found = flow(Residual(lambda m, x: torch.tanh(norm(m, m.one(x)))))  # type: ignore[operator]
    tanh = next(n for n in found.nodes if op(n) == "tanh")
    assert op(found.carried(tanh.args[0])) == "linear"
    assert found.reads(tanh.args[0], next(iter(found.affines)))


def test_a_product_with_another_activation_is_not_seen_through() -> None:
    found = flow(Residual(lambda m, x: torch.tanh(m.one(x) * torch.sigmoid(m.two(x)))))
    tanh = next(n for n in found.nodes if op(n) == "tanh")
    assert op(found.carried(tanh.args[0])) == "mul"
