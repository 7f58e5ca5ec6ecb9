import numpy as np
import pytest
import torch
from torch import Tensor

from graphpeft.chain import (
    SRHT,
    AdjointSRHT,
    Chain,
    Dense,
    Diag,
    Factor,
    Scatter,
    constant,
    hadamard_factors,
    hadamard_matrix,
    kaiming,
    normal,
    zeros,
)
from graphpeft.chain.seeds import generator
from graphpeft.errors import AdapterError

FACTORS = {
    "dense": lambda: Dense(12, 8, normal(1.0)),
    "dense frozen": lambda: Dense(12, 8, normal(1.0), frozen=True),
    "diag": lambda: Diag(8, normal(1.0)),
    "diag frozen": lambda: Diag(8, normal(1.0), frozen=True),
    "srht": lambda: SRHT(5, 24, scale=0.3),
    "srht padded": lambda: SRHT(23, 22, scale=0.3),
    "srht paley": lambda: SRHT(12, 12, scale=1.0),
    "adjoint": lambda: AdjointSRHT(24, 5, scale=0.3),
    "adjoint padded": lambda: AdjointSRHT(22, 23, scale=0.3),
    "adjoint paley": lambda: AdjointSRHT(12, 12, scale=1.0),
    "scatter run": lambda: Scatter(9, ((2, 5),)),
    "scatter runs": lambda: Scatter(9, ((0, 2), (4, 5), (7, 9))),
}


@pytest.fixture(params=FACTORS.values(), ids=FACTORS.keys())
def factor(request: pytest.FixtureRequest) -> Factor:
    made: Factor = request.param().double()
    made.reset(lambda name: generator(3, "factor", name))
    return made


# Tolerances: everything is in float64, sums have fewer than 100 terms of size about 1, so 1e-12 is ample.


def test_matrix_is_forward_on_the_identity(factor: Factor) -> None:
    identity = torch.eye(factor.inputs, dtype=torch.float64)
    dense = factor.matrix().double()
    assert dense.shape == (factor.outputs, factor.inputs)
    assert dense.abs().sum() > 0
    torch.testing.assert_close(factor(identity).T, dense, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_forward_is_the_matrix_for_any_rank_of_x(factor: Factor, rank: int) -> None:
    x = torch.randn(*range(2, rank + 1), factor.inputs, dtype=torch.float64)
    torch.testing.assert_close(factor(x), x @ factor.matrix().double().T, atol=1e-12, rtol=0)


def test_times_is_multiplication_by_the_matrix(factor: Factor) -> None:
    other = torch.randn(factor.inputs, 3, dtype=torch.float64)
    torch.testing.assert_close(factor.times(other), factor.matrix().double() @ other, atol=1e-12, rtol=0)


def test_accumulate_adds_forward(factor: Factor) -> None:
    x, y = torch.randn(2, 3, factor.inputs).double(), torch.randn(2, 3, factor.outputs).double()
    given = x.flatten(0, 1) if factor.is_matmul else x
    torch.testing.assert_close(factor.accumulate(y, given, -0.7), y - 0.7 * factor(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("gap", [0, 1, 4])
def test_accumulate_through_scatter_touches_no_other_column(factor: Factor, gap: int) -> None:
    half = factor.outputs // 2
    rows = ((1, 1 + half), (1 + half + gap, 1 + factor.outputs + gap)) if gap else ((1, 1 + factor.outputs),)
    scatter = Scatter(factor.outputs + gap + 3, rows)
    x, y = torch.randn(4, factor.inputs).double(), torch.randn(4, scatter.outputs).double()
    out = factor.accumulate(y, x, 0.7, scatter)
    adapted = [column for run in rows for column in range(*run)]
    others = [column for column in range(scatter.outputs) if column not in adapted]
    assert torch.equal(out[:, others], y[:, others])
    torch.testing.assert_close(out[:, adapted], y[:, adapted] + 0.7 * factor(x), atol=1e-12, rtol=0)


def test_seed_decides_the_values(factor: Factor) -> None:
    def values(seed: int) -> list[Tensor]:
        factor.reset(lambda name: generator(seed, "factor", name))
        return [tensor.detach().clone() for tensor in (*factor.parameters(), *factor.buffers())]

    first, again, other = values(1), values(1), values(2)
    assert all(map(torch.equal, first, again))
    if not isinstance(factor, Scatter):  # the only factor without randomness
        assert not all(map(torch.equal, first, other))


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_tensors_are_neither_trained_nor_stored(frozen: bool) -> None:
    for factor in (Dense(3, 4, zeros(), frozen=frozen), Diag(3, zeros(), frozen=frozen)):
        assert [name for name, _ in factor.named_parameters()] == ([] if frozen else ["weight"])
        assert list(factor.state_dict()) == ([] if frozen else ["weight"])
        assert factor.weight.dtype == torch.float32


def test_transforms_store_nothing() -> None:
    for factor in (SRHT(4, 8, 1.0), AdjointSRHT(8, 4, 1.0), Scatter(8, ((0, 2), (3, 4)))):
        assert not factor.state_dict()
        assert not list(factor.parameters())


def test_dense_accumulates_in_one_kernel() -> None:
    chain = Scatter(9, ((0, 2), (4, 5))) @ Dense(3, 2, normal(1.0)) @ Dense(2, 4, normal(1.0))

    class Branch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = chain

        def forward(self, y: Tensor, x: Tensor) -> Tensor:
            return self.chain.accumulate(y, x)

    ops = [str(node.target) for node in torch.fx.symbolic_trace(Branch()).graph.nodes]
    assert sum("addmm" in op for op in ops) == 1
    assert not any("mul" in op or op.endswith("add") for op in ops)


def test_kaiming_is_uniform_on_one_over_root_fan_in() -> None:
    weight = torch.empty(200, 50)
    kaiming()(weight, generator(0, "x"))
    bound = 50**-0.5
    # 10,000 draws: the largest misses the bound by 1e-4 of it on average, the deviation of the std is below 1 %.
    assert 0.999 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)


def test_constant_and_normal() -> None:
    weight = torch.empty(100, 100)
    constant(0.25)(weight, generator(0, "x"))
    assert torch.equal(weight, torch.full((100, 100), 0.25))
    normal(0.5)(weight, generator(0, "x"))
    assert weight.std().item() == pytest.approx(0.5, rel=0.03)  # 10,000 draws: 0.7 % standard error
    assert weight.mean().abs() < 0.02  # four standard errors


def test_the_random_stream_never_changes() -> None:
    # Adapters regenerate their frozen tensors from a seed: these numbers must hold in every later version.
    rng = generator(0, "site", "model.q_proj.weight:q", "0", "weight")
    assert rng.uniform(size=2).tolist() == [0.29139491614704527, 0.9556002811611608]
    assert rng.permutation(12)[:4].tolist() == [2, 7, 11, 10]
    assert rng.normal() == pytest.approx(1.5190457521655272, rel=1e-15)  # takes a logarithm of the platform
    assert generator(0, "a", "b").uniform() != generator(0, "ab").uniform()


# The sketches


def _dense_transform(order: int) -> np.ndarray:
    a, b = hadamard_factors(order)
    return np.kron(hadamard_matrix(a), hadamard_matrix(b)).astype(float)


@pytest.mark.parametrize("d", [12, 24, 40, 64, 100, 144])  # 144 = 12 · 12: neither part is symmetric
def test_sketch_is_rows_of_the_kronecker_product(d: int) -> None:
    factor = SRHT(5, d, scale=0.5).double()
    factor.reset(lambda name: generator(0, name))
    signs, rows = factor.signs.numpy(), factor.rows.numpy()
    expected = 0.5 * _dense_transform(d)[rows][:, :d] * signs
    np.testing.assert_allclose(factor.matrix().numpy(), expected, atol=1e-12)
    assert set(np.unique(signs)) == {-1, 1}


@pytest.mark.parametrize("d", [12, 24, 40, 64, 100, 144])
def test_adjoint_is_the_transpose_of_the_sketch(d: int) -> None:
    sketch, adjoint = SRHT(5, d, scale=0.5).double(), AdjointSRHT(d, 5, scale=0.5).double()
    for factor in (sketch, adjoint):
        factor.reset(lambda name: generator(0, name))
    torch.testing.assert_close(adjoint.matrix(), sketch.matrix().T, atol=1e-12, rtol=0)
    torch.testing.assert_close(adjoint(torch.eye(5).double()), sketch.matrix(), atol=1e-12, rtol=0)


def test_sketch_of_an_exact_order_is_a_scaled_isometry() -> None:
    c_o, c_i = AdjointSRHT(24, 24, scale=24**-0.5).double(), SRHT(24, 24, scale=24**-0.5).double()
    for factor in (c_o, c_i):
        factor.reset(lambda name: generator(0, name))
        product = factor.matrix() @ factor.matrix().T
        torch.testing.assert_close(product, torch.eye(24).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(c_o(c_i(torch.eye(24).double())).abs().max(), torch.tensor(1.0).double())


def test_sketch_rows_are_distinct() -> None:
    factor = SRHT(24, 24, scale=1.0)
    factor.reset(lambda name: generator(0, name))
    assert sorted(factor.rows.tolist()) == list(range(24))


@pytest.mark.parametrize("make", [lambda: SRHT(25, 24, 1.0), lambda: AdjointSRHT(24, 25, 1.0)])
def test_sketch_of_too_large_a_rank(make: object) -> None:
    with pytest.raises(AdapterError, match=r"order 24 has no 25 distinct rows.*at most 24"):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("rows", [(), ((0, 0),), ((3, 2),), ((0, 3), (2, 4)), ((4, 5), (0, 1)), ((0, 11),), ((-1, 2),)])
def test_scatter_of_bad_rows(rows: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(AdapterError, match=r"rows .* within 0\.\.10"):
        Scatter(10, rows)


def test_factor_prints_its_shape() -> None:
    assert str(Dense(3, 4, zeros(), shared="x")) == "Dense(3, 4, shared='x')"
    assert str(Diag(3, zeros(), frozen=True)) == "Diag(3, 3, frozen=True)"
    assert str(Scatter(4, ((0, 1),))) == "Scatter(4, rows=((0, 1),))"
    assert isinstance(Dense(3, 4, zeros()) @ Dense(4, 3, zeros()), Chain)
