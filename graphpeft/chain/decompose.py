"""Decompositions of a base weight into a pair (B₀, A₀): where OLoRA and PiSSA start."""

from __future__ import annotations

import torch
from torch import Tensor


def qr(weight: Tensor, scale: float, r: int, pivot: bool = False) -> tuple[Tensor, Tensor]:
    """The first r columns of Q and rows of R in the reduced W = Q R, `(outputs, r)` and `(r, inputs)`.

    Signs are chosen so that R's diagonal is not negative, which makes the factors the same with every backend. With
    `pivot`, the column with the largest remainder comes next (Businger & Golub, 1965), instead of the columns in their
    order. The scale is not used: B₀ A₀ is the projection of W onto r of its columns, as in the paper.
    """
    if not pivot:
        q, upper = torch.linalg.qr(weight)
        signs = torch.where(upper.diagonal() < 0, -1.0, 1.0).to(weight)[:r]
        return q[:, :r] * signs, upper[:r] * signs.unsqueeze(1)
    left = weight.clone()
    directions: list[Tensor] = []
    for _ in range(r):
        column = left[:, left.square().sum(0).argmax()]
        for direction in directions:  # orthogonalize again, against rounding errors
            column = column - (direction @ column) * direction
        directions.append(column / column.norm().clamp_min(torch.finfo(column.dtype).tiny))
        left = left - torch.outer(directions[-1], directions[-1] @ left)
    q = torch.stack(directions, 1)
    return q, q.t() @ weight


def svd(weight: Tensor, scale: float, r: int) -> tuple[Tensor, Tensor]:
    """(U √(Σ / s), √(Σ / s) Vᵀ) of the r largest singular values, so that scale · B₀ A₀ is the principal part of W.

    The entry of largest magnitude in each left vector is positive, which makes the factors the same with every backend.
    """
    u, values, v = torch.linalg.svd(weight, full_matrices=False)
    peaks = u.gather(0, u.abs().argmax(0, keepdim=True))[0, :r]
    signs, roots = torch.where(peaks < 0, -1.0, 1.0).to(weight), (values[:r] / scale).sqrt()
    return u[:, :r] * (signs * roots), (signs * roots).unsqueeze(1) * v[:r]
