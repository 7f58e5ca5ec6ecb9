"""Add adapters' updates to stored weights, one weight in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import cast

import torch

from graphpeft.chain import Chain, Dense, Factor, Stack
from graphpeft.errors import AdapterError
from graphpeft.ir.site import Site
from graphpeft.rewrite.delta import added, update
from graphpeft.rewrite.state import saved

BLOCK = 1 << 19
"""Values summed at a time: few enough to stay in the CPU cache."""


@dataclass
class Scratch:
    """Buffers for large matrices, reused from weight to weight: allocating fresh pages costs more than computing in them.
    They are numbered by `place`, because several updates of one weight exist at the same time."""

    kept: dict[int, torch.Tensor] = field(default_factory=dict)

    def matrix(self, place: int, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        found = self.kept.get(place)
        if found is None or found.dtype != dtype or found.numel() < rows * columns:
            self.kept.pop(place, None)
            found = self.kept[place] = torch.empty(rows * columns, dtype=dtype)
        return found[: rows * columns].view(rows, columns)


@dataclass(frozen=True)
class Update:
    """One adapter's update at one site. The chain is on the meta device until it is used."""

    adapter: str
    site: Site
    chain: Chain
    tensors: Mapping[str, torch.Tensor]
    """The whole adapter's tensors, by their names in its file."""
    seed: int

    def delta(self, weight: torch.Tensor, scratch: Scratch, place: int) -> torch.Tensor:
        """ΔW in the layout of the stored weight; `weight` is the base weight."""
        chain, site = self.chain, self.site
        # Tensors that sites share leave the meta device at the first site; later sites find them allocated.
        chain._apply(lambda tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor)
        chain.reset(self.seed, site.key)
        for key, tensor in saved(site, chain):
            tensor.copy_(self.tensors[key])
        with chain.settled():
            delta = _product(chain, scratch, place) if _is_product(chain) else update(chain, weight, site)
        return (delta.transpose(-1, -2) if site.transposed else delta).reshape(weight.shape)


def _is_product(chain: Chain) -> bool:
    """Whether ΔW is one large matrix product, as in LoRA, which can be written into an existing buffer."""
    first = chain.factors[0]
    return (
        type(first) is Dense and len(chain.factors) > 1 and not chain.needs_base_weight and not isinstance(chain, Stack)
    )


def _product(chain: Chain, scratch: Scratch, place: int) -> torch.Tensor:
    """`chain.delta()`, by the same operations in the same order, with a single matrix of that size."""
    first, *others, last = cast(list[Factor], list(chain.factors))
    left, right = first.matrix(), reduce(lambda product, factor: factor.times(product), reversed(others), last.matrix())
    whole = scratch.matrix(place, first.outputs, last.inputs, torch.promote_types(left.dtype, right.dtype))
    torch.mm(left, right, out=whole)
    return whole if chain.scale == 1 else whole.mul_(chain.scale)


def folded(name: str, weight: torch.Tensor, updates: Sequence[Update], scratch: Scratch) -> Iterator[torch.Tensor]:
    """The weight plus all updates in turn, block by block along its first axis; bit-identical to `gp.merge`.

    Sums are in float32 or wider, and are cast last. Raises `AdapterError` if a value of the result is not finite.
    """
    with torch.no_grad():
        deltas = [each.delta(weight, scratch, place) for place, each in enumerate(updates)]
    wide = torch.promote_types(weight.dtype, torch.float32)
    rows = max(1, BLOCK * len(weight) // max(1, weight.numel()))
    with _one_thread():
        for start in range(0, len(weight), rows):
            block = weight[start : start + rows].to(wide)
            for delta in deltas:
                block = added(block, delta[start : start + rows], transposed=False)
            block = block.to(weight.dtype)
            if not all(math.isfinite(extreme) for extreme in torch.aminmax(block)):
                raise _endless(name, weight, updates, deltas)
            yield block


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one torch thread: the blocks are so small that, on a busy machine, synchronizing threads costs more than the
    sums themselves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _endless(
    name: str, weight: torch.Tensor, updates: Sequence[Update], deltas: Sequence[torch.Tensor]
) -> AdapterError:
    bad = [each.adapter for each, delta in zip(updates, deltas, strict=True) if not torch.isfinite(delta).all()]
    if bad:
        cause = (
            f"the update of {bad[0]} has them. Usually training diverged: take an earlier checkpoint of the adapter."
        )
    elif not torch.isfinite(weight).all():
        cause = "the base weight itself has them. Copy the base again, or leave this weight out of the rules."
    else:
        cause = f"the sum is too large for {weight.dtype}. Store the base in a wider dtype first."
    return AdapterError(f"{name} would have NaN or infinite values when merged: {cause} Nothing was written.")
