"""RLoRA: ΔW = diag(out) · C_o · diag(mid) · C_i with fast random projections C."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

from graphpeft.chain import SRHT, AdjointSRHT, Chain, Diag, constant, hadamard_order, zeros
from graphpeft.methods.base import Method, Rank
from graphpeft.program import Site


@dataclass(frozen=True)
class RLoRA(Method):
    """ΔW = diag(out) · C_o · diag(mid) · C_i, the C being randomized Hadamard transforms (Lei et al., 2024).

    This is a reconstruction from the paper's abstract; its full text was not available. The abstract says that a
    randomized Walsh-Hadamard transform replaces LoRA's pair of projections and leaves far fewer trained numbers.
    Assumed here: the transform is the SRHT of the first author's earlier work (Lei & Lan, 2020), the trained part
    is VeRA's two diagonals (Kopiczko et al., 2024), and entries of C have VeRA's size, √(2 / fan-in).

    A rank above the order of a site's Hadamard transforms, which is at least its number of features, is cut to
    that order. Trains outputs + r numbers per site.
    """

    name: ClassVar[str] = "rlora"
    paper: ClassVar[str] = (
        "Lei, Qian, Cheung, Fast Randomized Low-Rank Adaptation of Pre-trained Language Models with PAC "
        "Regularization, Findings of ACL 2024, doi:10.18653/v1/2024.findings-acl.310"
    )

    r: Rank = 256

    def chain(self, site: Site) -> Chain:
        r = min(self.r, hadamard_order(site.inputs), hadamard_order(site.outputs))
        C_i = SRHT(r, site.inputs, scale=sqrt(2 / site.inputs))
        C_o = AdjointSRHT(site.outputs, r, scale=sqrt(2 / r))
        return Diag(site.outputs, zeros()) @ C_o @ Diag(r, constant(0.1)) @ C_i
