"""RLoRA: ΔW = diag(out) · C_o · diag(mid) · C_i with fast random projections C."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, Literal

from graphpeft.chain import SRHT, AdjointSRHT, Chain, Dense, Diag, constant, hadamard_order, zeros
from graphpeft.ir.site import Site
from graphpeft.methods.base import Method, Rank, Summary


@dataclass(frozen=True)
class RLoRA(Method):
    """ΔW = diag(out) · C_o · diag(mid) · C_i, where the C are randomized Hadamard transforms (Lei et al., 2024).

    This is a reconstruction from the paper's abstract; its full text was not available. The abstract says that a
    randomized Walsh-Hadamard transform replaces LoRA's pair of projections and leaves far fewer trained numbers.
    Assumed here: the transform is the SRHT of the first author's earlier work (Lei & Lan, 2020), the trained part
    is VeRA's two diagonals (Kopiczko et al., 2024), and entries of C have VeRA's size, √(2 / fan-in).

    `train` selects what is trained between and around the transforms; ΔW is zero at the start in every case:

    | `train` | ΔW | trained numbers per site |
    |---|---|---|
    | `out_mid` | diag(out) · C_o · diag(mid) · C_i | outputs + r |
    | `in_out` | diag(out) · C_o · 0.1 · C_i · diag(in) | inputs + outputs |
    | `in_mid_out` | diag(out) · C_o · diag(mid) · C_i · diag(in) | inputs + r + outputs |
    | `core` | C_o · core · C_i, `core` a dense r × r matrix | r² |
    | `b_only` | B · C_i, `B` a dense outputs × r matrix | r · outputs |

    `rows` selects the r rows of a Hadamard matrix H_a ⊗ H_b that make C: `grid` takes the products of some rows of H_a
    and some of H_b, which is several times cheaper; `uniform` takes any rows. A rank above the order of a site's
    transforms, which is at least its number of features, is reduced to that order.
    """

    name: ClassVar[str] = "rlora"
    paper: ClassVar[str] = (
        "Lei, Qian, Cheung, Fast Randomized Low-Rank Adaptation of Pre-trained Language Models with PAC "
        "Regularization, Findings of ACL 2024, doi:10.18653/v1/2024.findings-acl.310"
    )
    summary: ClassVar[Summary] = Summary(
        update="diag(out) · C* · diag(mid) · C*, C a fast Hadamard transform",
        trained="out + r; five variants",
        start="0, by out = 0",
        as_lora="rank r",
    )
    examples: ClassVar[Mapping[str, int | None]] = {
        "rlora(r=16)": 16,
        "rlora(r=16, rows=uniform)": 16,
        "rlora(r=16, train=in_out)": 16,
        "rlora(r=16, train=in_mid_out)": 16,
        "rlora(r=8, train=core)": 8,
        "rlora(r=8, train=b_only)": 8,
    }

    r: Rank = 256
    train: Literal["out_mid", "in_out", "in_mid_out", "core", "b_only"] = "out_mid"
    rows: Literal["grid", "uniform"] = "grid"

    def chain(self, site: Site) -> Chain:
        r = min(self.r, hadamard_order(site.inputs), hadamard_order(site.outputs))
        C_i = SRHT(r, site.inputs, scale=sqrt(2 / site.inputs), rows=self.rows)
        C_o = AdjointSRHT(site.outputs, r, scale=sqrt(2 / r), rows=self.rows)
        out, ones, mid = Diag(site.outputs, zeros()), Diag(site.inputs, constant(1.0)), Diag(r, constant(0.1))
        if self.train == "out_mid":
            return out @ C_o @ mid @ C_i
        if self.train == "in_out":
            return (out @ C_o @ C_i @ ones).scaled(0.1)
        if self.train == "in_mid_out":
            return out @ C_o @ mid @ C_i @ ones
        if self.train == "core":
            return C_o @ Dense(r, r, zeros()) @ C_i
        return Dense(site.outputs, r, zeros()) @ C_i
