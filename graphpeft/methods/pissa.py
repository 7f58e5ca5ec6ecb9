"""PiSSA: LoRA that starts at the principal singular values and vectors of the base weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import ClassVar

from graphpeft.chain import Chain, DeltaFromInit, svd
from graphpeft.ir.site import Site
from graphpeft.methods.base import Method, Positive, Probability, Rank, Summary, check_rank


@dataclass(frozen=True)
class PiSSA(Method):
    """ΔW = s · (B · A − B₀ · A₀), with s · B₀ · A₀ the best approximation of W of rank r (Meng et al., 2024).

    The paper subtracts it from the base weight; here this is part of the update, and the base weight is untouched.
    `alpha`, `rslora` and `dropout` as in LoRA. Trains r · (inputs + outputs) numbers per site. Raises `AdapterError`
    for r above min(inputs, outputs).
    """

    name: ClassVar[str] = "pissa"
    paper: ClassVar[str] = (
        "Meng, Wang, Zhang, PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models, "
        "NeurIPS 2024, arXiv:2404.02948"
    )
    summary: ClassVar[Summary] = Summary(
        update="s · (B A - B₀* A₀*), s B₀ A₀ from SVD of W",
        trained="r (in + out)",
        start="0",
        as_lora="rank 2r",
    )
    examples: ClassVar[Mapping[str, int | None]] = {
        "pissa(r=4)": 8,
    }

    r: Rank = 8
    alpha: Positive | None = None
    rslora: bool = False
    dropout: Probability = 0.0

    def chain(self, site: Site) -> Chain:
        check_rank(self, self.r, site)
        alpha = self.r if self.alpha is None else self.alpha
        scale = alpha / (sqrt(self.r) if self.rslora else self.r)
        pair = DeltaFromInit(site.outputs, self.r, "left") @ DeltaFromInit(site.inputs, self.r, "right")
        return pair.scaled(scale).with_dropout(self.dropout).with_init_from(partial(svd, r=self.r))
