"""B-LoRA: LoRA that learns its rank and the precision of its tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from graphpeft.chain import WIDTHS, Chain, Dense, Diag, Ladder, RankGate, Weighted, constant, normal
from graphpeft.methods.base import Method, NotNegative, Positive, Rank, Where
from graphpeft.program import Site

Bits = tuple[Annotated[int, Where(lambda bits: bits in WIDTHS, "2, 4, 8, 16 or 32")], ...]
Three = Annotated[Bits, Where(lambda bits: len(bits) == 3, "a tuple of three of 2, 4, 8, 16 and 32, for B, E and A")]


@dataclass(frozen=True)
class BLoRA(Method):
    """ΔW = (α / r) · B̂ · diag(Ê ⊙ g) · Â, the hats being learned precisions, g learned rank gates (Meo et al., 2024).

    Each of B, E and A is rounded to 2, 4, 8, 16 or 32 bits on a learned range, and g keeps the first k of r directions;
    what is rounded and kept is decided by hard concrete gates, random in training and fixed in evaluation. The training
    loss takes `gp.penalty(model)`: `lambda_bits` times the expected number of open bit gates of each tensor, or with
    `cost=bop` times its expected bit operations, and `lambda_rank` times the mean probability of the rank gates (with
    `nested`, of each together with those before it). Gates and ranges have rates of their own and no weight decay:
    `gp.parameter_groups`. Afterwards `gp.compact` makes a smaller adapter of what the gates left: rank k, and of tensors
    below 32 bits integers. `gp.bops` counts bit operations.

    A and B start at N(0, 0.02²), and every entry of E at `start`: at 0, as in AdaLoRA, the update is zero (the authors'
    code draws E at random) and the first gradient reaches E alone. With `drop`, B, E and A may end at no bits, and the
    site goes. `bits` fixes the precision of B, E and A, and the rank is r then: what `compact` leaves.

    Trains r · (inputs + 1 + outputs) numbers per site and 12 + 3 + r - 1 gates and ranges. See `graphpeft.chain.ladder`
    about a patent on learned bit widths.
    """

    name: ClassVar[str] = "blora"
    paper: ClassVar[str] = (
        "Meo, Sycheva, Goyal, Dauwels, Bayesian-LoRA: LoRA based Parameter Efficient Fine-Tuning using Optimal Quantization "
        "levels and Rank Values trough Differentiable Bayesian Gates, arXiv:2406.13046"
    )

    r: Rank = 8
    alpha: Positive | None = None
    lambda_bits: NotNegative = 1e-3
    lambda_rank: NotNegative = 1e-3
    cost: Literal["constant", "bop"] = "constant"
    nested: bool = False
    logit: float = 6.0
    start: float = 0.0
    drop: bool = False
    bits: Three | None = None

    def chain(self, site: Site) -> Chain:
        B = Dense(site.outputs, self.r, normal(0.02))
        E = Diag(self.r, constant(self.start))
        A = Dense(self.r, site.inputs, normal(0.02))
        if self.bits is None:
            for factor in (B, E, A):
                factor.through(Ladder(factor.macs, self.lambda_bits, self.cost, self.logit, self.drop))
            E.through(RankGate(self.r, self.lambda_rank, self.logit, self.nested))
        else:
            for tensor, bits in zip((B, E, A), self.bits, strict=True):
                tensor.coded(bits)
        return (B @ E @ A).scaled((self.r if self.alpha is None else self.alpha) / self.r)

    def compacted(self, chain: Chain) -> Method | None:
        factors = [factor for factor in chain.factors if isinstance(factor, Weighted)]
        bits = tuple(factor.bits for factor in factors)
        gates = [t for factor in factors for t in factor.applied if isinstance(t, RankGate)]
        r = min((gate.kept() for gate in gates), default=self.r)
        if not r or 0 in bits:
            return None
        # The scale is α / r of the rank that was trained.
        alpha = self.alpha * r / self.r if self.alpha is not None else None
        return replace(self, r=r, alpha=alpha, bits=bits)
