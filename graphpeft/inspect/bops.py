"""Bit operations: the cost of products at reduced precision and rank on hardware that supports them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from graphpeft.chain import Chain, Factor, FakeQuantizer, IntCodes
from graphpeft.planning.plan import Entry
from graphpeft.rewrite.entry import on_model
from graphpeft.rewrite.state import chains, get_state
from graphpeft.show.table import table

FULL = 32
"""Bits of a weight or activation that is not rounded."""


@dataclass(frozen=True)
class Bops:
    """Bit operations per position: Σ multiplications · bits of the weight · bits of the activation. Prints as a table.

    The counts are nominal: without low-precision kernels nothing gets faster.
    """

    adapters: int
    base: int
    """Bit operations of the adapted weights only."""
    reference: Bops | None = None
    """The same with every gate open and 32 bits everywhere."""

    @property
    def total(self) -> int:
        return self.adapters + self.base

    def __str__(self) -> str:
        reference = self.reference or self
        pairs = {"adapters": (self.adapters, reference.adapters), "base": (self.base, reference.base),
                 "total": (self.total, reference.total)}  # fmt: skip
        rows = [(name, f"{now:,}", f"{full:,}", f"{now / full:.1%}") for name, (now, full) in pairs.items() if full]
        return table(
            ("", "bit operations", "at 32 bits", "share"), rows, right=["bit operations", "at 32 bits", "share"]
        )


@on_model()
def bops(model: nn.Module) -> Bops:
    """Bit operations per position of the active adapters and of the weights they adapt, with gates as in evaluation.

    Σ MACs · b_w · b_a, as in Bayesian Bits (van Baalen et al., 2020); a gated rank counts only the directions it keeps.
    Raises `AdapterError` for a model without adapters.
    """
    state = get_state(model)
    found = {"now": 0, "full": 0, "base": 0, "whole": 0}
    for name in state.active:
        trained = chains(model, name)
        for entry in state.adapters[name].entries:
            copies = entry.site.stack or 1
            base = copies * entry.site.outputs * entry.site.inputs
            adapter, weight, activation = _now(entry, trained[entry.site])
            found["now"] += copies * adapter
            found["base"] += base * weight * activation
            found["full"] += copies * _full(entry)
            found["whole"] += base * FULL * FULL
    return Bops(found["now"], found["base"], Bops(found["full"], found["whole"]))


def _now(entry: Entry, chain: Chain) -> tuple[int, int, int]:
    """Bit operations of the chain after `compact`, and bits of the base weight and of the input."""
    method = entry.method.compacted(chain)
    if method is None:
        return 0, FULL, FULL
    with torch.device("meta"):
        smaller = Entry(entry.site, method, entry.rule).build()
    around = [FULL if part is None else _bits(part) for part in (smaller.reweight, smaller.before)]
    *rest, first = (factor for factor in smaller.factors if isinstance(factor, Factor))
    total = first.macs * _bits(first) * around[1] + sum(factor.macs * _bits(factor) * FULL for factor in rest)
    return total, around[0], around[1]


def _bits(part: nn.Module) -> int:
    """Bits of a factor's weight, or of a quantizer in the chain."""
    found = (m.bits for m in part.modules() if isinstance(m, (IntCodes, FakeQuantizer)))
    return next(found, FULL)


def _full(entry: Entry) -> int:
    with torch.device("meta"):
        return entry.build().macs * FULL * FULL
