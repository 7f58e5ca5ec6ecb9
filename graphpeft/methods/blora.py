"""B-LoRA: LoRA that learns its rank and the precision of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, TypeVar

from graphpeft.chain import (
    WIDTHS,
    ActivationQuantizer,
    Chain,
    Dense,
    Diag,
    FakeQuantizer,
    LearnedQuantizer,
    QuantizedBase,
    RankGate,
    Transform,
    Weighted,
    constant,
    normal,
)  # fmt: skip
from graphpeft.errors import RuleError
from graphpeft.ir.site import Site
from graphpeft.methods.base import Method, NotNegative, Positive, Rank, Summary, Where

F = TypeVar("F", bound=Weighted)
Bits = tuple[Annotated[int, Where(lambda bits: bits in WIDTHS, "2, 4, 8, 16 or 32")], ...]
Fixed = Annotated[
    Bits,
    Where(lambda bits: 3 <= len(bits) <= 5, "a tuple of 2, 4, 8, 16 or 32 for each of B, E, A, and W and x if rounded"),
]


@dataclass(frozen=True)
class BLoRA(Method):
    """ΔW = (α / r) · B̂ · diag(Ê ⊙ g) · Â, with learned precisions (hats) and learned rank gates g (Meo et al., 2024).

    Each of B, E and A is rounded to 2, 4, 8, 16 or 32 bits on a learned range, and g keeps the first k of r directions.
    Hard concrete gates decide both; they are random in training and fixed in evaluation. Add `gp.penalty(model)` to the
    training loss: `lambda_bits` times the expected number of open bit gates of each tensor, or with `cost=bop` times
    its expected bit operations, plus `lambda_rank` times the mean probability of the rank gates (with `nested`, of each
    together with those before it). Gates and ranges have their own learning rates and no weight decay:
    `gp.parameter_groups`. After training, `gp.compact` makes a smaller adapter of what the gates keep: rank k, and
    integers for tensors below 32 bits. `gp.bops` counts bit operations.

    A and B start at N(0, 0.02²), and every entry of E at `start`. At 0, as in AdaLoRA, the update is zero (the authors'
    code draws E at random) and the first gradient reaches E alone. With `drop`, B, E and A may end at zero bits, which
    removes the site. With `quantize=base` the site also reads W at a learned precision. With `quantize=all` it also
    reads its input x at a learned precision, and the adapter cannot be merged (the authors' code rounds intermediate
    results as well). `bits` fixes the precisions of B, E, A and, if they are rounded, of W and x, and fixes the rank to
    r; `compact` makes such a method.

    Trains r · (inputs + 1 + outputs) numbers per site and 12 + 3 + r - 1 gates and ranges. `graphpeft.chain.quantizers`
    mentions a patent on learned bit widths.
    """

    name: ClassVar[str] = "blora"
    paper: ClassVar[str] = (
        "Meo, Sycheva, Goyal, Dauwels, Bayesian-LoRA: LoRA based Parameter Efficient Fine-Tuning using Optimal Quantization "
        "levels and Rank Values trough Differentiable Bayesian Gates, arXiv:2406.13046"
    )
    summary: ClassVar[Summary] = Summary(
        update="s · B̂ · diag(Ê ⊙ g) · Â, rounded to learned bits, gated to a learned rank",
        trained="r (in + 1 + out) + gates",
        start="0, by E = 0",
        as_lora="rank kept",
    )
    examples: ClassVar[Mapping[str, int | None]] = {
        "blora(r=4)": 4,
        "blora(r=4, quantize=base, bits=(32, 32, 32, 32))": 4,
    }

    r: Rank = 8
    alpha: Positive | None = None
    lambda_bits: NotNegative = 1e-3
    lambda_rank: NotNegative = 1e-3
    cost: Literal["constant", "bop"] = "constant"
    nested: bool = False
    logit: float = 6.0
    start: float = 0.0
    drop: bool = False
    quantize: Literal["adapter", "base", "all"] = "adapter"
    bits: Fixed | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        rounded = 3 + ("adapter", "base", "all").index(self.quantize)
        if self.bits is not None and len(self.bits) != rounded:
            raise RuleError(
                f"blora: option bits = {self.bits} must give {rounded} precisions with quantize={self.quantize}, in the order "
                f"B, E, A, W, x. Usually only `quantize` was changed."
            )
        if self.drop and self.quantize != "adapter":
            raise RuleError("blora: drop=true needs quantize=adapter: a dropped site would read W and x unrounded.")

    def chain(self, site: Site) -> Chain:
        B = self._at(0, Dense(site.outputs, self.r, normal(0.02)))
        E = self._at(1, Diag(self.r, constant(self.start)))
        A = self._at(2, Dense(self.r, site.inputs, normal(0.02)))
        if self.bits is None:
            E.with_transforms(RankGate(self.r, self.lambda_rank, self.logit, self.nested))
        chain = (B @ E @ A).scaled((self.r if self.alpha is None else self.alpha) / self.r)
        if self.quantize != "adapter":
            chain.with_weight_rule(QuantizedBase(self._rounding(3, LearnedQuantizer, site)))
        return (
            chain.with_input_transform(self._rounding(4, ActivationQuantizer, site))
            if self.quantize == "all"
            else chain
        )

    def _at(self, place: int, factor: F) -> F:
        if self.bits is not None:
            return factor.as_codes(self.bits[place])
        return factor.with_transforms(LearnedQuantizer(factor.macs, self.lambda_bits, self.cost, self.logit, self.drop))

    def _rounding(self, place: int, learned: type[LearnedQuantizer], site: Site) -> Transform:
        if self.bits is not None:
            return FakeQuantizer(self.bits[place])
        return learned(site.outputs * site.inputs, self.lambda_bits, self.cost, self.logit)

    def compacted(self, chain: Chain) -> Method | None:
        if self.bits is not None:
            return self
        ladders = [module for module in chain.modules() if isinstance(module, LearnedQuantizer)]
        (gate,) = (module for module in chain.modules() if isinstance(module, RankGate))
        r, bits = gate.kept(), tuple(ladder.bits() for ladder in ladders)
        if 0 in bits:
            return None
        # The scale stays α / r with the trained rank r.
        return replace(self, r=r, alpha=self.alpha and self.alpha * r / self.r, bits=bits, drop=False)
