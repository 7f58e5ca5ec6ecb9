"""OLoRA: LoRA that starts at the QR decomposition of the base weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import ClassVar

from graphpeft.chain import Chain, DeltaFromInit, qr
from graphpeft.ir.site import Site
from graphpeft.methods.base import Method, Positive, Probability, Rank, Summary, check_rank


@dataclass(frozen=True)
class OLoRA(Method):
    """ΔW = (α / r) · (B · A − B₀ · A₀), with B₀ = Q[:, :r] and A₀ = R[:r] of W = Q R (Büyükakyüz, 2024).

    The paper subtracts (α / r) · B₀ A₀ from the base weight; here the subtraction is part of the update, which has rank
    2r, and the base weight is untouched. QR without pivoting reproduces the first r columns of W, so it depends on the
    order of features; `pivot` takes the largest columns instead, which is not the paper's method. The update is large
    from the first step on, so use smaller learning rates than LoRA's. `alpha`, `rslora` and `dropout` as in LoRA.
    Trains r · (inputs + outputs) numbers per site. Raises `AdapterError` for r above min(inputs, outputs).
    """

    name: ClassVar[str] = "olora"
    paper: ClassVar[str] = (
        "Büyükakyüz, OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models, arXiv:2406.01775"
    )
    summary: ClassVar[Summary] = Summary(
        update="s · (B A - B₀* A₀*), B₀ A₀ from QR of W",
        trained="r (in + out)",
        start="0",
        as_lora="rank 2r",
    )
    examples: ClassVar[Mapping[str, int | None]] = {
        "olora(r=4)": 8,
    }

    r: Rank = 8
    alpha: Positive | None = None
    rslora: bool = False
    dropout: Probability = 0.0
    pivot: bool = False

    def chain(self, site: Site) -> Chain:
        check_rank(self, self.r, site)
        alpha = self.r if self.alpha is None else self.alpha
        scale = alpha / (sqrt(self.r) if self.rslora else self.r)
        pair = DeltaFromInit(site.outputs, self.r, "left") @ DeltaFromInit(site.inputs, self.r, "right")
        return pair.scaled(scale).with_dropout(self.dropout).with_init_from(partial(qr, r=self.r, pivot=self.pivot))
