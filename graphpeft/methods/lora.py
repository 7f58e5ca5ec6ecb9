"""LoRA: ΔW = (α / r) · B · A."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

from graphpeft.chain import Chain, Dense, kaiming, zeros
from graphpeft.methods.base import Method, Positive, Probability, Rank
from graphpeft.program import Site


@dataclass(frozen=True)
class LoRA(Method):
    """ΔW = (α / r) · B · A: a trained pair of matrices through a bottleneck of r features (Hu et al., 2022).

    `alpha=None` stands for α = r, a scale of 1. With `rslora` the scale is α / √r, which keeps the size of the
    update independent of a large rank (Kalajdzievski, 2023). Trains r · (inputs + outputs) numbers per site.
    """

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv:2106.09685"

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
