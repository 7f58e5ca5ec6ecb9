"""Statistics of a trained adapter, site by site: size and effective rank of the update, and the choices of its gates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphpeft.chain import Chain, IntCodes, LearnedQuantizer, RankGate
from graphpeft.errors import AdapterError
from graphpeft.ir.site import Site
from graphpeft.rewrite.delta import update

DENSE = 1024
"""The largest size at which singular values are computed for an update that is not a product of two thin matrices."""


@dataclass(frozen=True)
class Numbers:
    """Statistics of one site; `None` means unknown, as on the meta device, or not applicable."""

    update: float | None
    """‖ΔW‖ / ‖W‖, Frobenius norms, over the adapted rows: 0 before training."""
    effective_rank: float | None
    """exp of the entropy of ΔW's singular values, normalized to sum 1 (Roy and Vetterli, 2007); `None` where ΔW = 0."""
    kept: int | None
    """How many directions a rank gate keeps."""
    bits: tuple[int, ...]
    """Learned or fixed precisions, in the order of the chain's factors."""


@torch.no_grad()
def numbers(chain: Chain, weight: Tensor, site: Site) -> Numbers:
    """The statistics of a branch and its base weight, with their current values."""
    gate = next((part for part in chain.modules() if isinstance(part, RankGate)), None)
    learned = [part for part in chain.modules() if isinstance(part, (LearnedQuantizer, IntCodes))]
    if weight.is_meta or chain.device.type == "meta":
        return Numbers(None, None, None, ())
    delta = update(chain, weight, site)
    moved = float(delta.norm() / weight.float().norm().clamp_min(1e-30))
    bits = tuple(part.bits if isinstance(part, IntCodes) else part.bits() for part in learned)
    return Numbers(moved, _effective_rank(chain, delta) if moved else None, gate.kept() if gate else None, bits)


def _effective_rank(chain: Chain, delta: Tensor) -> float | None:
    """The effective rank, averaged over the matrices of a stacked update."""
    values = _singular(chain, delta)
    if values is None:
        return None
    shares = values / values.sum(-1, keepdim=True).clamp_min(1e-30)
    return float(torch.special.entr(shares).sum(-1).exp().mean())


def _singular(chain: Chain, delta: Tensor) -> Tensor | None:
    """Singular values of ΔW = B A, from the r × r product of the R factors of QR decompositions of B and Aᵀ."""
    try:
        with chain.settled():
            a, b = chain.to_lora()
    except AdapterError:
        return torch.linalg.svdvals(delta.float()) if min(delta.shape[-2:]) <= DENSE else None
    if a.shape[-2] > min(a.shape[-1], b.shape[-2]):
        return torch.linalg.svdvals(b.float() @ a.float())
    left, right = torch.linalg.qr(b.float()).R, torch.linalg.qr(a.float().mT).R
    return torch.linalg.svdvals(left @ right.mT)
