"""Hadamard matrices: square, of entries ±1, with orthogonal rows.

Built by Sylvester's doubling (orders 2m), Paley's first construction (orders q + 1 for q ≡ 3 mod 4) and his second
(2(q + 1) for q ≡ 1 mod 4), where q is a prime, its square or its cube (Paley, 1933). Together they reach the usual
model widths exactly: 768 = 24 · 32, 5120 = 64 · 80, 11008 = 32 · 344, 14336 = 112 · 128.
"""

from __future__ import annotations

from functools import cache
from itertools import count, product
from math import isqrt
from typing import Any

import numpy as np

from graphpeft.errors import AdapterError

Matrix = np.ndarray[Any, np.dtype[np.int8]]


def hadamard_factors(n: int) -> tuple[int, int]:
    """Orders (a, b), a ≤ b, of two Hadamard matrices whose Kronecker product has the smallest usable order ≥ `n`.

    The transform of order a·b costs a + b multiplications per feature, so b is at most max(64, 12a).
    """
    return next(split for order in count(n) if (split := _split(order)))


def hadamard_order(n: int) -> int:
    """The smallest order ≥ `n` that `hadamard_factors` finds."""
    a, b = hadamard_factors(n)
    return a * b


@cache
def hadamard_matrix(n: int) -> Matrix:
    """A Hadamard matrix of order `n`, read-only int8. Raises `AdapterError` if no construction here gives one."""
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
        if b > max(64, 12 * a):
            return None
        if a * b == order and constructible(a) and constructible(b):
            return a, b
    return None


def _paley_1(n: int) -> bool:
    return n % 4 == 0 and _field(n - 1) is not None


def _paley_2(n: int) -> bool:
    return n % 4 == 0 and n // 2 % 4 == 2 and _field(n // 2 - 1) is not None


def _field(q: int) -> tuple[int, int] | None:
    """(p, k) with q = pᵏ for a prime p and k at most 3, or `None`."""
    p = next((divisor for divisor in range(2, isqrt(q) + 1) if q % divisor == 0), q)
    return next(((p, k) for k in (1, 2, 3) if q > 1 and p**k == q), None)


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
    """Jacobsthal's matrix of the field of q elements inside a border of ones with a zero corner.

    Its entry [a, b] is 1 if a - b is a square, -1 if it is not, and 0 on the diagonal.
    """
    p, k = _field(q) or (q, 1)
    elements = np.array(list(product(range(p), repeat=k)))  # polynomials of degree < k, the constant term first
    places = p ** np.arange(k)[::-1]
    symbol = np.full(q, -1, np.int8)
    symbol[[_square(a, p, _modulus(p, k)) @ places for a in elements]] = 1
    symbol[0] = 0
    border = np.ones((q + 1, q + 1), np.int8)
    border[1:, 1:] = symbol[(elements[:, None] - elements) % p @ places]
    border[0, 0] = 0
    return border


@cache
def _modulus(p: int, k: int) -> tuple[int, ...]:
    """Coefficients m of an xᵏ - m(x) without roots modulo p, which for k ≤ 3 does not factor."""
    polynomials = product(range(p), repeat=k)
    powers = [[x**i for i in range(k + 1)] for x in range(p)]
    return next(m for m in polynomials if k == 1 or all((x[k] - np.dot(x[:k], m)) % p for x in powers))


def _square(a: Matrix, p: int, modulus: tuple[int, ...]) -> Matrix:
    result = np.convolve(a, a) % p
    for degree in range(len(result) - 1, len(a) - 1, -1):
        result[degree - len(a) : degree] += result[degree] * np.array(modulus)
    return result[: len(a)] % p
