"""DoRA: LoRA on the direction of each output feature's weights, and a trained length for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from graphpeft.chain import Chain, Magnitude
from graphpeft.ir.site import Site
from graphpeft.methods.base import Method, Positive, Rank, Summary
from graphpeft.methods.lora import LoRA


@dataclass(frozen=True)
class DoRA(Method):
    """W + ΔW = diag(m) · (W + s · B · A), with rows normalized to length 1 before m scales them (Liu et al., 2024).

    `alpha` and `rslora` as in LoRA. The update depends on the base weight and has full rank, so it can be merged but is
    not a plain LoRA. A plain projection scales its output features by m / ‖W + s · B · A‖ and forms no adapted weight;
    any other site forms W + ΔW once per forward pass. Trains r · (inputs + outputs) + outputs numbers per site.
    """

    name: ClassVar[str] = "dora"
    paper: ClassVar[str] = (
        "Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen, DoRA: Weight-Decomposed Low-Rank Adaptation, ICML 2024, arXiv:2402.09353"
    )
    summary: ClassVar[Summary] = Summary(
        update="diag(m / ‖W + s B A‖) · (W + s · B · A) - W",
        trained="r (in + out) + out",
        start="0",
        as_lora="no",
    )
    examples: ClassVar[Mapping[str, int | None]] = {
        "dora(r=4)": None,
    }

    r: Rank = 8
    alpha: Positive | None = None
    rslora: bool = False

    def chain(self, site: Site) -> Chain:
        return LoRA(self.r, self.alpha, self.rslora).chain(site).with_weight_rule(Magnitude(site.outputs))
