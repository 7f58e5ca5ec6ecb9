"""MELoRA: n small LoRAs side by side, each on its own chunk of the features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import ClassVar, Literal

from graphpeft.chain import BlockDiag, Chain, MixedBlocks, kaiming, zeros
from graphpeft.errors import AdapterError, RuleError
from graphpeft.ir.site import Site
from graphpeft.methods.base import Method, Positive, Probability, Rank, Summary


@dataclass(frozen=True)
class MELoRA(Method):
    """ΔW = s · diag(B₁ … Bₙ) · diag(A₁ … Aₙ): n mini adapters of rank r, of total rank n · r (Ren et al., 2024).

    Mini adapter i maps chunk i of the inputs to chunk i of the outputs; other parts of ΔW stay zero. `r` is the rank of
    each, or a tuple with one rank for each. `alpha=None` means a scale of 1; otherwise s is α / mini-rank, as in the
    authors' code, or with `scale=total` α / total rank, as in other implementations, which is n times smaller. Trains
    r · (inputs + outputs) numbers per site for every n. Raises `AdapterError` where n does not divide both widths.
    """

    name: ClassVar[str] = "melora"
    paper: ClassVar[str] = (
        "Ren, Shi, Wu, Zhang, Ren, de Rijke, Chen, Pei, MELoRA: Mini-Ensemble Low-Rank Adapters for Parameter-Efficient "
        "Fine-Tuning, ACL 2024, arXiv:2402.17263"
    )
    summary: ClassVar[Summary] = Summary(
        update="s · diag(B₁ … Bₙ) · diag(A₁ … Aₙ)",
        trained="r (in + out), r the rank of each",
        start="0, by B = 0",
        as_lora="rank n · r",
    )
    examples: ClassVar[Mapping[str, int | None]] = {
        "melora(n=4, r=2)": 8,
        "melora(n=2, r=(1, 3), alpha=2)": 4,
    }

    n: Rank = 4
    r: Rank | tuple[Rank, ...] = 8
    alpha: Positive | None = None
    scale: Literal["mini", "total"] = "mini"
    dropout: Probability = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.r, tuple) and len(self.r) != self.n:
            raise RuleError(
                f"melora: r gives {len(self.r)} ranks for n={self.n} mini adapters. Give one rank, or {self.n}."
            )

    def chain(self, site: Site) -> Chain:
        self._check(site)
        ranks = self.r if isinstance(self.r, tuple) else (self.r,) * self.n
        total = sum(ranks)
        scales = [1.0 if self.alpha is None else self.alpha / (total if self.scale == "total" else r) for r in ranks]
        if len(set(ranks)) == 1:
            A = BlockDiag(self.n, total, site.inputs, kaiming())
            B = BlockDiag(self.n, site.outputs, total, zeros())
            return (B @ A).scaled(scales[0]).with_dropout(self.dropout)
        mixed_A = MixedBlocks([(r, site.inputs // self.n) for r in ranks], kaiming())
        mixed_B = MixedBlocks([(site.outputs // self.n, r) for r in ranks], zeros(), scales)
        return (mixed_B @ mixed_A).with_dropout(self.dropout)

    def _check(self, site: Site) -> None:
        common = gcd(*site.shape)
        if common % self.n:
            admissible = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise AdapterError(
                f"`{self}` cannot split {site.weight} ({site.role}), which is {site.outputs} × {site.inputs}: n must divide "
                f"both. Admissible n: {admissible}."
            )
