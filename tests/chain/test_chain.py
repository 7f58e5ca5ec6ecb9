import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, fx, nn

import graphpeft.chain
from graphpeft.chain import SRHT, AdjointSRHT, Chain, Dense, Diag, Scatter, constant, kaiming, normal, zeros
from graphpeft.errors import AdapterError

CHAINS = {
    "lora": lambda: (Dense(20, 4, normal(1.0)) @ Dense(4, 12, kaiming())).scaled(1.5),
    "vera": lambda: (
        Diag(20, normal(1.0))
        @ Dense(20, 4, kaiming(), frozen=True, shared="B")
        @ Diag(4, constant(0.3))
        @ Dense(4, 12, kaiming(), frozen=True, shared="A")
    ),
    "frozen B": lambda: (Dense(20, 4, kaiming(), frozen=True) @ Dense(4, 12, normal(1.0))).scaled(0.5),
    "rlora": lambda: Diag(20, normal(1.0)) @ AdjointSRHT(20, 6, 0.4) @ Diag(6, normal(1.0)) @ SRHT(6, 12, 0.4),
    "padded": lambda: Diag(21, normal(1.0)) @ AdjointSRHT(21, 6, 0.4) @ Diag(6, normal(1.0)) @ SRHT(6, 13, 0.4),
    "diag": lambda: Chain([Diag(12, normal(1.0))], scale=2.0),
    "dense": lambda: Chain([Dense(20, 12, normal(1.0))], scale=-0.5),
    "fused": lambda: Scatter(30, ((0, 10), (15, 25))) @ (Dense(20, 4, normal(1.0)) @ Dense(4, 12, kaiming())),
    "fused run": lambda: Scatter(30, ((5, 25),)) @ (Dense(20, 4, normal(1.0)) @ Dense(4, 12, kaiming())).scaled(2.0),
    "fused rlora": lambda: (
        Scatter(30, ((0, 10), (15, 25)))
        @ (Diag(20, normal(1.0)) @ AdjointSRHT(20, 6, 0.4) @ Diag(6, normal(1.0)) @ SRHT(6, 12, 0.4))
    ),
}


class Branch(nn.Module):
    """What the lowering puts into a graph."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.chain.accumulate(y, x)


@pytest.fixture(params=CHAINS.values(), ids=CHAINS.keys())
def chain(request: pytest.FixtureRequest) -> Chain:
    made: Chain = request.param().double()
    made.reset(5, "model.q.weight:q")
    return made


def sample(chain: Chain, *leading: int) -> tuple[Tensor, Tensor]:
    """(y, x) in float64."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda width: torch.randn(*leading, width, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(chain.outputs), draw(chain.inputs)


# Tolerances: float64 and short sums of numbers of size about 1, so 1e-12 is ample unless said otherwise.
close = {"atol": 1e-12, "rtol": 0}


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 3, 4)])
def test_forward_accumulate_and_delta_agree(chain: Chain, leading: tuple[int, ...]) -> None:
    y, x = sample(chain, *leading)
    delta = chain.delta()
    assert delta.shape == (chain.outputs, chain.inputs)
    assert delta.abs().max() > 1e-3
    torch.testing.assert_close(chain(x), x @ delta.T, **close)
    torch.testing.assert_close(chain.accumulate(y, x), y + x @ delta.T, **close)


def test_delta_is_the_product_of_the_matrices(chain: Chain) -> None:
    product = torch.eye(chain.inputs, dtype=torch.float64)
    for factor in reversed(chain.factors):
        product = factor.matrix().double() @ product
    torch.testing.assert_close(chain.delta(), chain.scale * product, **close)


def test_gradients_are_those_of_the_dense_matrix(chain: Chain) -> None:
    y, x = sample(chain, 3)
    x.requires_grad_()
    tensors = [x, *chain.parameters()]
    weights = torch.randn(3, chain.outputs, dtype=torch.float64)
    expected = torch.autograd.grad((weights * (x @ chain.delta().T)).sum(), tensors, allow_unused=True)
    for output in (chain(x), chain.accumulate(y, x)):
        got = torch.autograd.grad((weights * output).sum(), tensors)
        for mine, dense in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, dense, **close)


def test_lora_pair_is_exact_and_as_narrow_as_the_chain(chain: Chain) -> None:
    if len(chain.factors) < 2:
        with pytest.raises(AdapterError, match=r"alone has no inner width.*Merge"):
            chain.to_lora()
        return
    a, b = chain.to_lora()
    assert a.shape == (chain.rank, chain.inputs)
    assert b.shape == (chain.outputs, chain.rank)
    torch.testing.assert_close(b @ a, chain.delta(), **close)


def test_rank_bounds_the_rank_of_delta(chain: Chain) -> None:
    # Random factors reach their bound.
    assert torch.linalg.matrix_rank(chain.delta()) == chain.rank


def test_untouched_columns_of_a_fused_projection_keep_their_bits() -> None:
    for name in ("fused", "fused run", "fused rlora"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            chain = CHAINS[name]().to(dtype)
            chain.reset(0, "x")
            y, x = (tensor.to(dtype) for tensor in sample(chain, 7))
            out = chain.accumulate(y, x)
            adapted = [column for run in chain.factors[0].rows for column in range(*run)]
            others = [column for column in range(30) if column not in adapted]
            assert torch.equal(out[:, others], y[:, others])
            assert not torch.equal(out[:, adapted], y[:, adapted])


# Tracing


def test_symbolic_trace_follows_the_tensors(chain: Chain) -> None:
    y, x = sample(chain, 2, 3)
    whole, branch = fx.symbolic_trace(chain), fx.symbolic_trace(Branch(chain))
    # New values must show in the traced graph: no tensor was evaluated while tracing.
    chain.reset(6, "other")
    assert torch.equal(whole(x), chain(x))
    assert torch.equal(branch(y, x), chain.accumulate(y, x))
    assert not any("_tensor_constant" in str(node.target) for node in [*whole.graph.nodes, *branch.graph.nodes])


def test_a_traced_graph_serves_activations_of_any_rank(chain: Chain) -> None:
    branch = fx.symbolic_trace(Branch(chain))
    for leading in ((), (3,), (2, 3, 4)):
        y, x = sample(chain, *leading)
        assert torch.equal(branch(y, x), chain.accumulate(y, x))


def test_export_with_dynamic_batch(chain: Chain) -> None:
    y, x = sample(chain, 3, 5)
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    program = torch.export.export(Branch(chain), (y, x), dynamic_shapes=(dynamic, dynamic))
    y, x = sample(chain, 2, 7)
    assert torch.equal(program.module()(y, x), chain.accumulate(y, x))


@pytest.mark.parametrize("name", ["fused", "fused rlora", "padded"])
def test_onnx_runtime_computes_the_same(name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    chain = CHAINS[name]().float()
    chain.reset(0, "x")
    y, x = (tensor.float() for tensor in sample(chain, 2, 3))
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    program = torch.onnx.export(
        Branch(chain).eval(), (y, x), dynamo=True, dynamic_shapes=(dynamic, dynamic), verbose=False
    )
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    y, x = (tensor.float() for tensor in sample(chain, 4, 5))
    feeds = dict(zip((node.name for node in session.get_inputs()), (y.numpy(), x.numpy()), strict=True))
    (got,) = session.run(None, feeds)
    # float32, sums of at most 24 terms: a few units in the last place of numbers of size about 10.
    torch.testing.assert_close(torch.from_numpy(got), chain.accumulate(y, x), atol=2e-5, rtol=1e-5)


def test_compiled_graph_has_no_breaks(chain: Chain) -> None:
    y, x = sample(chain, 3)
    torch.compiler.reset()  # the chains of this file share their code: a recompilation is no graph break
    compiled = torch.compile(Branch(chain), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(y, x), chain.accumulate(y, x), **close)


# Dropout and scale


def test_dropout_acts_on_the_input_in_training_only() -> None:
    chain = Chain([Diag(1000, constant(1.0))]).with_dropout(0.25)
    chain.reset(0, "x")
    x = torch.ones(1000)
    assert torch.equal(chain.eval()(x), x)
    torch.manual_seed(0)
    dropped = chain.train()(x)
    # Kept features are scaled by 1 / (1 - p); 1000 draws of probability 0.25 have a standard deviation of 13.7.
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert 195 < (dropped == 0).sum() < 305
    traced = fx.symbolic_trace(chain)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["dropout"]
    assert torch.equal(chain.delta(), torch.eye(1000))


def test_without_dropout_there_is_no_module() -> None:
    assert not hasattr(CHAINS["lora"](), "dropout")
    assert not hasattr(CHAINS["lora"]().with_dropout(0.5).with_dropout(0.0), "dropout")


def test_scales_and_dropout_survive_multiplication() -> None:
    left, right = Chain([Diag(3, zeros())], scale=2.0), Chain([Diag(3, zeros())], scale=3.0, dropout=0.5)
    both = left @ right
    assert (both.scale, both.probability) == (6.0, 0.5)
    assert both.scaled(0.5).scale == 3.0
    assert both.scaled(0.5).probability == 0.5
    with pytest.raises(AdapterError, match="whole chain"):
        right @ left


def test_order_of_factors_is_as_written() -> None:
    a, b, c = Dense(2, 3, zeros()), Dense(4, 2, zeros()), Diag(4, zeros())
    for chain in (c @ b @ a, c @ (b @ a), Chain([c, b, a])):
        assert list(chain.factors) == [c, b, a]
        assert (chain.outputs, chain.inputs, chain.rank) == (4, 3, 2)


def test_widths_have_to_meet() -> None:
    with pytest.raises(AdapterError, match=r"Dense\(4, 3\) @ Dense\(2, 5\).*reads 3 features.*makes 2"):
        Dense(4, 3, zeros()) @ Dense(2, 5, zeros())


# Randomness


def values(chain: Chain, seed: int, site: str) -> list[Tensor]:
    chain.reset(seed, site)
    return [tensor.detach().clone() for tensor in (*chain.parameters(), *chain.buffers())]


def test_values_depend_on_seed_and_site_alone() -> None:
    for make in (CHAINS["lora"], CHAINS["rlora"]):
        first = values(make(), 1, "a")
        values(make(), 1, "b")  # attached in between
        torch.manual_seed(99)
        assert all(map(torch.equal, first, values(make(), 1, "a")))
        assert not all(map(torch.equal, first, values(make(), 1, "b")))
        assert not all(map(torch.equal, first, values(make(), 2, "a")))


def test_shared_factors_do_not_depend_on_the_site() -> None:
    first, second = CHAINS["vera"](), CHAINS["vera"]()
    first.reset(1, "a")
    second.reset(1, "b")
    assert torch.equal(first.factors[1].weight, second.factors[1].weight)
    assert torch.equal(first.factors[3].weight, second.factors[3].weight)
    assert not torch.equal(first.factors[0].weight, second.factors[0].weight)
    second.reset(2, "a")
    assert not torch.equal(first.factors[1].weight, second.factors[1].weight)


def test_factors_of_a_chain_differ() -> None:
    chain = Dense(4, 4, normal(1.0)) @ Dense(4, 4, normal(1.0))
    chain.reset(0, "x")
    assert not torch.equal(chain.factors[0].weight, chain.factors[1].weight)


def test_a_scatter_in_front_changes_no_value() -> None:
    plain, fused = CHAINS["lora"](), Scatter(30, ((0, 20),)) @ CHAINS["lora"]()
    plain.reset(0, "x")
    fused.reset(0, "x")
    assert torch.equal(plain.delta(), fused.delta()[:20])


def test_values_agree_between_dtypes() -> None:
    wide, narrow = CHAINS["lora"]().double(), CHAINS["lora"]().bfloat16()
    for mine, other in zip(values(wide, 0, "x"), values(narrow, 0, "x"), strict=True):
        assert torch.equal(mine.bfloat16(), other)


# Life of a module


def test_meta_device_costs_nothing_and_can_be_filled(chain: Chain, request: pytest.FixtureRequest) -> None:
    with torch.device("meta"):
        planned: Chain = request.node.callspec.params["chain"]().double()
    assert all(tensor.is_meta for tensor in (*planned.parameters(), *planned.buffers()))
    planned.reset(5, "model.q.weight:q")  # leaves meta tensors alone
    assert planned.trainable() == chain.trainable()
    planned.to_empty(device="cpu")
    planned.reset(5, "model.q.weight:q")
    assert torch.equal(planned.delta(), chain.delta())


def test_copies_are_independent_and_equal(chain: Chain) -> None:
    expected = chain.delta()
    copies = [copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))]
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.zero_()
    for duplicate in copies:
        assert torch.equal(duplicate.delta(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(chain: Chain, dtype: torch.dtype) -> None:
    chain.to(dtype)
    y, x = (tensor.to(dtype) for tensor in sample(chain, 2, 3))
    delta = chain.delta()
    assert delta.dtype == torch.float32
    exact = y.float() + x.float() @ delta.T
    got = chain.accumulate(y, x)
    assert got.dtype == dtype
    assert chain(x).dtype == dtype
    # At most six roundings of intermediates, of relative size eps / 2 each; values reach a few times exact's largest.
    assert (got.float() - exact).abs().max() <= 6 * torch.finfo(dtype).eps * exact.abs().max()


def test_delta_is_at_least_float32() -> None:
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        for make in CHAINS.values():
            chain = make().to(dtype)
            chain.reset(0, "x")
            assert chain.delta().dtype == expected


def test_trainable_counts_parameters_that_train() -> None:
    chain = CHAINS["vera"]()
    assert chain.trainable() == 20 + 4
    chain.factors[0].weight.requires_grad_(False)
    assert chain.trainable() == 4


def test_former_names_of_members_answer() -> None:
    """Methods outside of graphpeft were written with them."""
    from graphpeft.chain import Dense, Magnitude, kaiming, zeros

    def pair() -> Chain:
        return Dense(6, 2, zeros()) @ Dense(2, 4, kaiming())

    with pytest.warns(DeprecationWarning, match="Chain.reweighted is called with_weight_rule now"):
        old = pair().reweighted(Magnitude(6))
    assert old.needs_base_weight
    with pytest.warns(DeprecationWarning, match="Chain.beside is called has_side_path now"):
        assert (old.relative, old.beside) == (True, old.has_side_path)
    with pytest.warns(DeprecationWarning, match="Dense.through"):
        assert Dense(6, 2, zeros()).through().applied == []
    with pytest.warns(DeprecationWarning, match="graphpeft.chain.Reweight"):
        assert graphpeft.chain.Reweight is graphpeft.chain.WeightRule
