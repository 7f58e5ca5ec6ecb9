"""Updates of adapters onto stored weights, when nothing but the weight at hand is in memory."""

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
from graphpeft.rewrite.state import saved
from graphpeft.rewrite.weight_form import added, update

BLOCK = 1 << 19
"""Numbers that are summed at a time: few enough to stay in a cache."""


@dataclass
class Scratch:
    """Memory for large matrices that is kept from one weight to the next: fresh pages cost more than what is computed in
    them. By place, for several updates of one weight are there at a time."""

    kept: dict[int, torch.Tensor] = field(default_factory=dict)

    def matrix(self, place: int, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        found = self.kept.get(place)
        if found is None or found.dtype != dtype or found.numel() < rows * columns:
            self.kept.pop(place, None)
            found = self.kept[place] = torch.empty(rows * columns, dtype=dtype)
        return found[: rows * columns].view(rows, columns)


@dataclass(frozen=True)
class Update:
    """What one adapter adds at one site. The chain is on the meta device until it is used."""

    adapter: str
    site: Site
    chain: Chain
    tensors: Mapping[str, torch.Tensor]
    """Of the whole adapter, as its file names them."""
    seed: int

    def delta(self, weight: torch.Tensor, scratch: Scratch, place: int) -> torch.Tensor:
        """ΔW laid out as the weight is stored; `weight` is the base's."""
        chain, site = self.chain, self.site
        # What sites share is made once, and is no longer on the meta device when the next site comes.
        chain._apply(lambda tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor)
        chain.reset(self.seed, site.key)
        for key, tensor in saved(site, chain):
            tensor.copy_(self.tensors[key])
        with chain.settled():
            delta = _product(chain, scratch, place) if _is_product(chain) else update(chain, weight, site)
        return (delta.transpose(-1, -2) if site.transposed else delta).reshape(weight.shape)


def _is_product(chain: Chain) -> bool:
    """Whether ΔW is one large product, such as LoRA's, that can be made in memory that is there."""
    first = chain.factors[0]
    return (
        type(first) is Dense and len(chain.factors) > 1 and not chain.needs_base_weight and not isinstance(chain, Stack)
    )


def _product(chain: Chain, scratch: Scratch, place: int) -> torch.Tensor:
    """`chain.delta()`, by the same operations in the same order, without making more than one matrix of its size."""
    first, *others, last = cast(list[Factor], list(chain.factors))
    left, right = first.matrix(), reduce(lambda product, factor: factor.times(product), reversed(others), last.matrix())
    whole = scratch.matrix(place, first.outputs, last.inputs, torch.promote_types(left.dtype, right.dtype))
    torch.mm(left, right, out=whole)
    return whole if chain.scale == 1 else whole.mul_(chain.scale)


def folded(name: str, weight: torch.Tensor, updates: Sequence[Update], scratch: Scratch) -> Iterator[torch.Tensor]:
    """The weight with all updates added in turn, block by block along its first axis; the same numbers as `gp.merge` makes.

    Sums are in float32 or wider, and cast last. Raises `AdapterError` if a number of the result is not finite.
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
    """Threads would wait for each other after every small step, which takes longer than the steps on a machine that has
    other work to do."""
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
        cause = f"the update of {bad[0]} has. Usually training diverged: take an earlier checkpoint of the adapter."
    elif not torch.isfinite(weight).all():
        cause = "the base weight itself has. Copy the base again, or leave this weight out of the rules."
    else:
        cause = f"the sum is too large for {weight.dtype}. Store the base in a wider dtype first."
    return AdapterError(f"{name} would have NaN or infinite values when merged: {cause} Nothing was written.")
