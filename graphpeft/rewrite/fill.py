"""Copy the values of a LoRA pair into a plain LoRA chain."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from graphpeft.chain import Chain, Dense
from graphpeft.ir.site import Site


def fill(chain: Chain, a: Tensor, b: Tensor, site: Site) -> None:
    """Give a plain LoRA chain the values of a pair with B A = ΔW, of its own rank or, filled up with zeros, a lower one."""
    left, right = (cast(Dense, factor) for factor in list(chain.factors)[-2:])
    if site.rows and b.shape[-2] == site.full:
        b = torch.cat([b[..., start:stop, :] for start, stop in site.rows], -2)
    missing = right.weight.shape[-2] - a.shape[-2]
    left.weight.copy_(F.pad(b / chain.scale, (0, missing)))
    right.weight.copy_(F.pad(a, (0, 0, 0, missing)))
