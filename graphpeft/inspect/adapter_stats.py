"""What training has made of an adapter, site by site: how far it moved the weight, in how many directions, what gates chose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphpeft.chain import Chain, IntCodes, LearnedQuantizer, RankGate
from graphpeft.errors import AdapterError
from graphpeft.ir.site import Site
from graphpeft.rewrite.weight_form import update

DENSE = 1024
"""Up to this size the singular values of an update that is no product of two thin matrices are computed."""


@dataclass(frozen=True)
class Numbers:
    """Of one site; `None` is unknown, as on the meta device, or does not apply."""

    update: float | None
    """‖ΔW‖ / ‖W‖, Frobenius norms, over the adapted rows: 0 before training."""
    effective_rank: float | None
    """exp of the entropy of ΔW's singular values as shares of their sum (Roy and Vetterli, 2007); `None` where ΔW = 0."""
    kept: int | None
    """Directions that a rank gate keeps."""
    bits: tuple[int, ...]
    """Precisions, in the order of the chain's factors, where they are learned or fixed."""


@torch.no_grad()
def numbers(chain: Chain, weight: Tensor, site: Site) -> Numbers:
    """The numbers of a branch on its base weight, both as they are now."""
    gate = next((part for part in chain.modules() if isinstance(part, RankGate)), None)
    learned = [part for part in chain.modules() if isinstance(part, (LearnedQuantizer, IntCodes))]
    if weight.is_meta or chain.device.type == "meta":
        return Numbers(None, None, None, ())
    delta = update(chain, weight, site)
    moved = float(delta.norm() / weight.float().norm().clamp_min(1e-30))
    bits = tuple(part.bits if isinstance(part, IntCodes) else part.bits() for part in learned)
    return Numbers(moved, _effective_rank(chain, delta) if moved else None, gate.kept() if gate else None, bits)


def _effective_rank(chain: Chain, delta: Tensor) -> float | None:
    """The mean over the matrices, where an update is a stack of them."""
    values = _singular(chain, delta)
    if values is None:
        return None
    shares = values / values.sum(-1, keepdim=True).clamp_min(1e-30)
    return float(torch.special.entr(shares).sum(-1).exp().mean())


def _singular(chain: Chain, delta: Tensor) -> Tensor | None:
    """Singular values of ΔW = B A: those of the product of the two triangles of their QR decompositions, r × r."""
    try:
        with chain.settled():
            a, b = chain.to_lora()
    except AdapterError:
        return torch.linalg.svdvals(delta.float()) if min(delta.shape[-2:]) <= DENSE else None
    if a.shape[-2] > min(a.shape[-1], b.shape[-2]):
        return torch.linalg.svdvals(b.float() @ a.float())
    left, right = torch.linalg.qr(b.float()).R, torch.linalg.qr(a.float().mT).R
    return torch.linalg.svdvals(left @ right.mT)
