import numpy as np
import pytest

from graphpeft.chain.hadamard import constructible, hadamard_factors, hadamard_matrix, hadamard_order
from graphpeft.errors import AdapterError

WIDTHS = [64, 384, 512, 768, 1024, 1280, 1536, 2048, 2560, 3072, 4096, 5120, 6656, 8192, 11008, 13824, 14336, 22016]
"""Widths of published models that have to be transformed without padding."""


@pytest.mark.parametrize("n", [n for n in range(1, 201) if constructible(n)])
def test_rows_are_orthogonal(n: int) -> None:
    h = hadamard_matrix(n).astype(int)
    assert set(np.unique(h)) <= {-1, 1}
    assert np.array_equal(h @ h.T, n * np.eye(n, dtype=int))


def test_constructible_orders() -> None:
    # Below 200, Paley and Sylvester miss only the orders that need other constructions.
    multiples = set(range(4, 201, 4))
    missing = {n for n in multiples if not constructible(n)}
    assert missing == {92, 116, 156, 172, 184, 188}
    assert {n for n in range(1, 201) if constructible(n)} == {1, 2} | multiples - missing


def test_each_construction_is_reached() -> None:
    assert not np.array_equal(hadamard_matrix(12), hadamard_matrix(12).T)  # Paley I is not symmetric
    assert np.array_equal(hadamard_matrix(36), hadamard_matrix(36).T)  # Paley II is
    assert np.array_equal(hadamard_matrix(4), np.kron([[1, 1], [1, -1]], [[1, 1], [1, -1]]))  # Sylvester


@pytest.mark.parametrize("n", WIDTHS)
def test_model_widths_need_no_padding(n: int) -> None:
    a, b = hadamard_factors(n)
    assert a * b == n == hadamard_order(n)
    for order in (a, b):
        h = hadamard_matrix(order).astype(int)
        assert np.array_equal(h @ h.T, order * np.eye(order, dtype=int))


@pytest.mark.parametrize("n", [*range(1, 130), 1000, 11008, 18944, 50257])
def test_order_is_little_larger_and_well_split(n: int) -> None:
    a, b = hadamard_factors(n)
    assert constructible(a)
    assert constructible(b)
    assert n <= a * b <= n + 4 + n // 8
    assert b <= max(64, 12 * a)


def test_unknown_order() -> None:
    with pytest.raises(AdapterError, match="order 92") as caught:
        hadamard_matrix(92)
    assert "96" in str(caught.value)


def test_matrices_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        hadamard_matrix(4)[0, 0] = 7
