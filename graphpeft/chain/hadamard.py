"""Hadamard matrices: square, of entries ±1, with orthogonal rows.

Built by Sylvester's doubling (orders 2m), Paley's first construction (orders q + 1 for a prime q ≡ 3 mod 4) and
his second (2(q + 1) for a prime q ≡ 1 mod 4) (Paley, 1933). Between them they reach the usual model widths
exactly: 768 = 24 · 32, 5120 = 64 · 80, 14336 = 112 · 128.
"""

from __future__ import annotations

from functools import cache
from itertools import count
from math import isqrt
from typing import Any

import numpy as np

from graphpeft.errors import AdapterError

Matrix = np.ndarray[Any, np.dtype[np.int8]]


def hadamard_factors(n: int) -> tuple[int, int]:
    """Orders (a, b), a ≤ b, of two Hadamard matrices whose Kronecker product has the smallest usable order ≥ `n`.

    The transform of order a·b costs a + b multiplications per feature, so past 64 only splits with b ≤ 4a count.
    """
    return next(split for order in count(n) if (split := _split(order)))


def hadamard_order(n: int) -> int:
    """The smallest order ≥ `n` that `hadamard_factors` finds."""
    a, b = hadamard_factors(n)
    return a * b


@cache
def hadamard_matrix(n: int) -> Matrix:
    """A Hadamard matrix of order `n`, read-only int8. Raises `AdapterError` where no construction is known here."""
    if not constructible(n):
        raise AdapterError(
            f"No Hadamard matrix of order {n} by Sylvester's or Paley's constructions; "
            f"hadamard_order({n}) gives the next usable order, {hadamard_order(n)}."
        )
    matrix = _build(n)
    matrix.setflags(write=False)
    return matrix


@cache
def constructible(n: int) -> bool:
    """Whether `hadamard_matrix(n)` exists."""
    return n == 1 or _paley_1(n) or _paley_2(n) or (n % 2 == 0 and n != 0 and constructible(n // 2))


@cache
def _split(order: int) -> tuple[int, int] | None:
    for a in range(isqrt(order), 0, -1):
        b = order // a
        if b > max(64, 4 * a):
            return None
        if a * b == order and constructible(a) and constructible(b):
            return a, b
    return None


def _paley_1(n: int) -> bool:
    return n % 4 == 0 and _prime(n - 1)


def _paley_2(n: int) -> bool:
    return n % 4 == 0 and n // 2 % 4 == 2 and _prime(n // 2 - 1)


def _prime(q: int) -> bool:
    return q > 1 and all(q % divisor for divisor in range(2, isqrt(q) + 1))


def _build(n: int) -> Matrix:
    if n == 1:
        return np.ones((1, 1), np.int8)
    if constructible(n // 2) and n % 2 == 0:
        half = hadamard_matrix(n // 2)
        return np.block([[half, half], [half, -half]])
    if _paley_1(n):
        border = _bordered(n - 1)
        border[1:, 0] = -1
        return border + np.eye(n, dtype=np.int8)
    signs, diagonal = np.array([[[1, 1], [1, -1]], [[1, -1], [-1, -1]]], np.int8)
    return np.kron(_bordered(n // 2 - 1), signs) + np.kron(np.eye(n // 2, dtype=np.int8), diagonal)


def _bordered(q: int) -> Matrix:
    """Jacobsthal's matrix of a prime q, [i, j] ↦ (i - j | q), inside a border of ones with a zero corner."""
    symbol = np.full(q, -1, np.int8)
    symbol[[i * i % q for i in range(1, q)]] = 1
    symbol[0] = 0
    places = np.arange(q)
    border = np.ones((q + 1, q + 1), np.int8)
    border[1:, 1:] = symbol[(places[:, None] - places) % q]
    border[0, 0] = 0
    return border
