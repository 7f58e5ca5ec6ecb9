"""A different adapter for every row of a batch: which rows of an activation an adapter acts on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from graphpeft.errors import AdapterError


@dataclass
class Assignment:
    """Which adapter each row of a batch has; one object for all owners of a model."""

    beams: int = 1
    """What a row may be repeated by, as in beam search."""
    count: int = 0
    rows: dict[str, Tensor] = field(default_factory=dict)
    """Of every adapter that takes part."""
    inner: dict[str, dict[str, bool]] = field(default_factory=dict)
    """By owner and slot of a site: whether the first axis of what it reads has positions inside of rows, flattened."""

    def assign(self, adapters: Sequence[str | None]) -> None:
        """Give each row its adapter, or none. Raises `AdapterError` for one that takes no part, and for no rows at all."""
        strange = sorted({name for name in adapters if name is not None and name not in self.rows})
        if strange or not adapters:
            given = f"of {strange[0]!r}, which takes no part" if strange else "of no rows"
            raise AdapterError(
                f"The list is {given}: the adapters here are {', '.join(self.rows) or 'none'}. Name every adapter that is to be "
                f"used when entering gp.per_row."
            )
        self.count = len(adapters)
        for name in self.rows:
            self.rows[name] = torch.tensor([i for i, each in enumerate(adapters) if each == name], dtype=torch.long)


class Rows(nn.Module):
    """What an owner's graph asks for the rows of an adapter."""

    def __init__(self, owner: str, assignment: Assignment) -> None:
        super().__init__()
        self.owner, self.assignment = owner, assignment
        self.inner = assignment.inner.setdefault(owner, {})
        self.seen: dict[str, Tensor] | None = None
        """While it is found out, what each site reads."""

    def forward(self, x: Tensor, adapter: str, slot: str) -> Tensor:
        """Indices along the first axis of `x`, which the site `slot` reads: the rows that `adapter` acts on."""
        given, length = self.assignment, x.shape[0]
        rows = given.rows[adapter].to(x.device)
        if self.seen is not None:
            self.seen[slot] = x
            return rows[:0]
        if length % given.count or not (self.inner[slot] or length // given.count in (1, given.beams)):
            raise AdapterError(
                f"{self.owner or 'The model'} got {length} rows, and gp.per_row was told the adapters of {given.count}. Give one "
                f"for every row of the batch, and `beams` for beam search."
            )
        each = length // given.count
        return rows if each == 1 else (rows[:, None] * each + torch.arange(each, device=x.device)).flatten()
