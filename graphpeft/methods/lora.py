"""LoRA: ΔW = (α / r) · B · A."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

from graphpeft.chain import Chain, Dense, kaiming, zeros
from graphpeft.ir.site import Site
from graphpeft.methods.base import Method, Positive, Probability, Rank, Summary


@dataclass(frozen=True)
class LoRA(Method):
    """ΔW = (α / r) · B · A: a trained pair of matrices through a bottleneck of r features (Hu et al., 2022).

    `alpha=None` means α = r, a scale of 1. With `rslora` the scale is α / √r, which keeps the size of the
    update independent of a large rank (Kalajdzievski, 2023). Trains r · (inputs + outputs) numbers per site.
    """

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv:2106.09685"
    summary: ClassVar[Summary] = Summary(
        update="s · B · A",
        trained="r (in + out)",
        start="0, by B = 0",
        as_lora="itself",
    )
    examples: ClassVar[Mapping[str, int | None]] = {
        "lora(r=4)": 4,
        "lora(r=4, alpha=8, rslora=true)": 4,
    }

    r: Rank = 8
    alpha: Positive | None = None
    rslora: bool = False
    dropout: Probability = 0.0

    def chain(self, site: Site) -> Chain:
        A = Dense(self.r, site.inputs, kaiming())
        B = Dense(site.outputs, self.r, zeros())
        alpha = self.r if self.alpha is None else self.alpha
        scale = alpha / (sqrt(self.r) if self.rslora else self.r)
        return (B @ A).scaled(scale).with_dropout(self.dropout)
