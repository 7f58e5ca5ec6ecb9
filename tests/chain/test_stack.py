"""A stack is as many independent chains, kept in one."""

from __future__ import annotations

import copy

import pytest
import torch

from graphpeft.chain import SRHT, AdjointSRHT, Chain, Dense, Diag, Scatter, Stack, kaiming, normal
from graphpeft.errors import AdapterError

CHAINS = {
    "lora": lambda: (Dense(20, 4, normal(1.0)) @ Dense(4, 12, kaiming())).scaled(1.5),
    "rlora": lambda: Diag(20, normal(1.0)) @ AdjointSRHT(20, 6, 0.4) @ Diag(6, normal(1.0)) @ SRHT(6, 12, 0.4),
    "vera": lambda: (
        Diag(20, normal(1.0))
        @ Dense(20, 4, kaiming(), frozen=True, shared="B")
        @ Diag(4, normal(1.0))
        @ Dense(4, 12, kaiming(), frozen=True, shared="A")
    ),
    "rows": lambda: Scatter(30, ((0, 10), (15, 25))) @ (Dense(20, 4, normal(1.0)) @ Dense(4, 12, kaiming())),
    "one run": lambda: Scatter(30, ((5, 25),)) @ Diag(20, normal(1.0)) @ Dense(20, 12, kaiming()),
    "dense": lambda: Chain([Dense(20, 12, normal(1.0))], scale=-0.5),
}
N = 3
# float64, and the same sums batched.
close = {"atol": 1e-12, "rtol": 0}


@pytest.fixture(params=CHAINS)
def pair(request: pytest.FixtureRequest) -> tuple[Stack, list[Chain]]:
    """A stack and the chains that it stands for, each filled by itself."""
    stack = Stack(CHAINS[request.param](), N).double()
    stack.reset(5, "experts:up")
    alone = [CHAINS[request.param]().double() for _ in range(N)]
    for e, chain in enumerate(alone):
        chain.reset(5, f"experts:up[{e}]")
    return stack, alone


def test_every_matrix_is_that_of_its_own_chain(pair: tuple[Stack, list[Chain]]) -> None:
    stack, alone = pair
    expected = torch.stack([chain.delta() for chain in alone])
    assert expected.shape == (N, stack.outputs, stack.inputs)
    assert not torch.equal(expected[0], expected[1])
    torch.testing.assert_close(stack.delta(), expected, **close)


def test_pairs_multiply_to_the_update(pair: tuple[Stack, list[Chain]]) -> None:
    stack, _ = pair
    if len(stack.factors) < 2:
        with pytest.raises(AdapterError, match="alone has no inner width"):
            stack.to_lora()
        return
    a, b = stack.to_lora()
    assert a.shape[::2] == (N, stack.inputs)
    torch.testing.assert_close(b @ a, stack.delta(), **close)


def test_gradients_are_those_of_the_chains(pair: tuple[Stack, list[Chain]]) -> None:
    stack, alone = pair
    weights = torch.randn(N, stack.outputs, stack.inputs, dtype=torch.float64)
    got = torch.autograd.grad((stack.delta() * weights).sum(), list(stack.parameters()))
    for e, chain in enumerate(alone):
        expected = torch.autograd.grad((chain.delta() * weights[e]).sum(), list(chain.parameters()))
        for mine, one in zip(got, expected, strict=True):
            torch.testing.assert_close(mine[e], one, **close)


def test_counts_and_rank(pair: tuple[Stack, list[Chain]]) -> None:
    stack, alone = pair
    assert stack.trainable() == N * alone[0].trainable()
    assert stack.rank == alone[0].rank
    assert "3 matrices" in repr(stack)


def test_shared_factors_are_not_stacked() -> None:
    stack = Stack(CHAINS["vera"](), N)
    assert [tuple(f.weight.shape) for f in stack.factors] == [(N, 20), (20, 4), (N, 4), (4, 12)]


def test_copies_are_independent() -> None:
    stack = Stack(CHAINS["lora"](), N)
    stack.reset(0, "x")
    clone = copy.deepcopy(stack)
    assert torch.equal(clone.delta(), stack.delta())
    clone.factors[0].weight.data.zero_()
    assert not clone.delta().any()
    assert stack.delta().any()


def test_a_stack_on_the_meta_device_is_left_alone() -> None:
    with torch.device("meta"):
        stack = Stack(CHAINS["rlora"](), N)
    stack.reset(0, "x")
    assert stack.delta().is_meta


def test_a_stack_has_no_side_path() -> None:
    with pytest.raises(AdapterError, match="no side path of their own"):
        Stack(CHAINS["lora"](), N).accumulate(torch.zeros(2, 20), torch.zeros(2, 12))
