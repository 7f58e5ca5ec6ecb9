"""VeRA: two trained vectors around frozen random matrices that the whole model shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from graphpeft.chain import Chain, Diag, Projection, SharedProjections, constant, zeros
from graphpeft.ir.site import Site
from graphpeft.methods.base import Method, Positive, Rank, Summary, Where


@dataclass(frozen=True)
class VeRA(Method):
    """ΔW = diag(b) · B · diag(d) · A, with A and B random, frozen and shared by all sites (Kopiczko et al., 2024).

    A and B are as wide as the adapter's widest site and drawn once from `key`; each site uses their first columns and
    rows. PEFT draws the same matrices for the same `projection_prng_key`. `store=projection` stores them in the
    adapter's file, in case a later generator draws differently; `store=key` stores b and d alone. b starts at zero, d
    at `d_initial`. Use learning rates about ten times LoRA's. Trains outputs + r numbers per site.
    """

    name: ClassVar[str] = "vera"
    paper: ClassVar[str] = (
        "Kopiczko, Blankevoort, Asano, VeRA: Vector-based Random Matrix Adaptation, ICLR 2024, arXiv:2310.11454"
    )
    summary: ClassVar[Summary] = Summary(
        update="diag(b) · B* · diag(d) · A*, one A, B for the model",
        trained="out + r",
        start="0, by b = 0",
        as_lora="rank r",
    )
    examples: ClassVar[Mapping[str, int | None]] = {
        "vera(r=16)": 16,
    }

    r: Rank = 256
    d_initial: Positive = 0.1
    key: Annotated[int, Where(lambda key: 0 <= key < 2**63, "int >= 0 and < 2**63")] = 0
    store: Literal["key", "projection"] = "key"

    def chain(self, site: Site) -> Chain:
        bank = SharedProjections(self.r, site.outputs, site.inputs, self.key)
        name, stored = f"vera.{self.key}.{self.r}", self.store == "projection"
        A = Projection(self.r, site.inputs, bank, "A", name, stored)
        B = Projection(site.outputs, self.r, bank, "B", name, stored)
        return Diag(site.outputs, zeros()) @ B @ Diag(self.r, constant(self.d_initial)) @ A
