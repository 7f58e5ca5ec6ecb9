"""What one training run of experiments E1 to E3 leaves, on whichever task."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Run:
    """One adapter trained once."""

    method: str
    lr: float
    seed: int
    trained: int
    curve: dict[int, float]
    """The task's score on held-out data by steps done; at 0 the base."""
    ranks: tuple[int, ...]
    """Numerical rank of ΔW at each site, singular values below 1e-5 of the largest being rounding in float32."""

    @property
    def final(self) -> float:
        return self.curve[max(self.curve)]


@torch.no_grad()
def ranks(model: nn.Module) -> tuple[int, ...]:
    from graphpeft.rewrite.state import chains

    return tuple(int(torch.linalg.matrix_rank(c.delta(), rtol=1e-5)) for c in chains(model, "default").values())
