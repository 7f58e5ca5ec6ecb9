"""Sums of a weight and an update ΔW."""

from __future__ import annotations

from typing import Any

import torch

from graphpeft.ir.site import Site
from graphpeft.ir.weights import as_out_in, weight_layout


def update(branch: Any, weight: torch.Tensor, site: Site) -> torch.Tensor:
    """ΔW of a branch on a base weight as it is stored; most branches do not look at it."""
    return branch.delta(
        as_out_in(weight, *weight_layout(site)) if getattr(branch, "needs_base_weight", False) else None
    )


def add_delta(weight: torch.Tensor, site: Site, delta: torch.Tensor) -> torch.Tensor:
    """The weight of a site with `delta` added to it."""
    return added(weight, delta, site.transposed)


def added(weight: torch.Tensor, delta: torch.Tensor, transposed: bool) -> torch.Tensor:
    """weight + delta, summed in the wider dtype and cast last; `weight` itself is not changed.

    `delta` is (out, in), or a stack of such; it takes the weight's shape, as that of a convolution.
    """
    if transposed:
        delta = delta.transpose(-1, -2)
    wide = torch.promote_types(weight.dtype, delta.dtype)
    return (weight.to(wide) + delta.to(wide).reshape(weight.shape)).to(weight.dtype)
