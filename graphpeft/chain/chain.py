"""The algebra of adapters: a `Chain` is a product of linear `Factor`s, a weight update ΔW that is never formed.

    y = W x + scale · F₁ F₂ … Fₙ x

`B @ A` multiplies factors as matrices multiply: A is applied first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import reduce
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphpeft.chain.factor import Factor, Scatter, widen
from graphpeft.chain.renamed import renamed
from graphpeft.chain.seeds import generator
from graphpeft.chain.transform import Transform
from graphpeft.chain.weight_rules import WeightRule
from graphpeft.errors import AdapterError

Start = Callable[[Tensor, float], tuple[Tensor, ...]]
"""Maps the base weight of a site, `(outputs, inputs)` in float32 or better, and the chain's scale to the initial values
of the factors, in the order in which they are written."""


class Chain(nn.Module):
    """`scale` times a product of factors, written as matrices are: the last one is applied first.

    `dropout` is the probability with which an input feature is zeroed before the first factor, in training only.
    Raises `AdapterError` if the widths of two neighboring factors differ.
    """

    def __init__(self, factors: Iterable[Factor], scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.factors = nn.ModuleList(factors)
        self.scale = scale
        self.strength = 1.0
        """A factor on the whole update while several adapters act together (see `activate`)."""
        self.start: Start | None = None
        self.reweight: WeightRule | None = None
        self.before: Transform | None = None
        if dropout:
            self.dropout = nn.Dropout(dropout)
        for left, right in pairwise(self._factors):
            if left.inputs != right.outputs:
                raise AdapterError(
                    f"{left} @ {right}: the left factor reads {left.inputs} features, the right one makes "
                    f"{right.outputs}. A factor is (outputs, inputs), and the rightmost is applied first."
                )

    @property
    def _factors(self) -> list[Factor]:
        return list(self.factors)  # type: ignore[arg-type]

    @property
    def _inner(self) -> list[Factor]:
        """The factors that the method declared, without the `Scatter` to the rows of a fused projection."""
        return [factor for factor in self._factors if not isinstance(factor, Scatter)]

    @property
    def outputs(self) -> int:
        return self._factors[0].outputs

    @property
    def inputs(self) -> int:
        return self._factors[-1].inputs

    @property
    def macs(self) -> int:
        """Multiply-accumulates per position."""
        return sum(factor.macs for factor in self._factors)

    @property
    def rank(self) -> int:
        """The narrowest width along the chain: an upper bound on the rank of ΔW."""
        if self.reweight is not None:
            return min(self.outputs, self.inputs)
        return min(self.outputs, *(factor.inputs for factor in self._factors))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensors that the chain computes with."""
        return self._like().dtype

    @property
    def device(self) -> torch.device:
        return self._like().device

    @property
    def probability(self) -> float:
        """The dropout probability."""
        return self.dropout.p if hasattr(self, "dropout") else 0.0

    def trainable(self) -> int:
        """The number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def scaled(self, scale: float) -> Chain:
        """The same factors with a scale `scale` times as large."""
        return self._with(self.scale * scale, self.probability)

    def with_dropout(self, probability: float) -> Chain:
        """The same factors with dropout on the input; 0 turns it off."""
        return self._with(self.scale, probability)

    def with_init_from(self, start: Start) -> Chain:
        """This chain, initialized from the base weight where there is one, instead of at random."""
        self.start = start
        return self

    def with_weight_rule(self, reweight: WeightRule) -> Chain:
        """This chain with an update that depends on the base weight."""
        self.reweight = reweight
        return self

    def with_input_transform(self, before: Transform) -> Chain:
        """This chain with a transform of the site's input, which the base weight and the update both read."""
        self.before = before
        return self

    @property
    def needs_base_weight(self) -> bool:
        """Whether the update depends on the base weight: `delta` then takes it, `accumulate` its product with x."""
        return self.reweight is not None

    @property
    def has_side_path(self) -> bool:
        """Whether the update can be computed beside the projection, instead of as a change of its weight."""
        return self.reweight is None or (self.reweight.has_side_path and len(self._inner) == len(self._factors))

    def _with(self, scale: float, probability: float) -> Chain:
        made = Chain(self._factors, scale, probability)
        made.start, made.reweight, made.before = self.start, self.reweight, self.before
        made.strength = self.strength
        return made

    @property
    def multiplier(self) -> float:
        """`scale` times `strength`. Rewritten code reads it whenever it runs, so that a change of either acts at once."""
        return self.scale * self.strength

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Put the chain into evaluation mode inside the context: no dropout, no noise, decided gates."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    @contextmanager
    def as_trained(self) -> Iterator[None]:
        """The chain in evaluation mode, and without the strength that the adapter may have been activated with."""
        strength, self.strength = self.strength, 1.0
        try:
            with self.settled():
                yield
        finally:
            self.strength = strength

    def __matmul__(self, other: Factor | Chain) -> Chain:
        right = other if isinstance(other, Chain) else Chain([other])
        if self.probability:
            raise AdapterError("Dropout acts on the input of a whole chain: multiply first, then call with_dropout.")
        made = Chain([*self._factors, *right._factors], self.scale * right.scale, right.probability)
        made.start, made.reweight, made.before = right.start, right.reweight, right.before
        return made

    def reset(self, seed: int, site: str, weight: Tensor | None = None) -> None:
        """Fill every tensor with initial values that depend on `(seed, site, place in the chain)` alone.

        The values of a shared factor depend on `(seed, its name)`. Tensors on the meta device are left alone. A chain
        with a `start` computes its values from the `weight` of the site, `(outputs, inputs)`, if that is given.
        """
        # Places are counted from the right, so that a Scatter added in front later does not shift them.
        for place, factor in enumerate(reversed(self._factors)):
            names = ("shared", factor.shared) if factor.shared else ("site", site, str(place))
            if not any(tensor.is_meta for tensor in (*factor.parameters(), *factor.buffers())):
                factor.reset(_streams(seed, names))
        weight = None if weight is None else widen(weight)
        if self.reweight is not None:
            self.reweight.reset(weight)
        if self.before is not None:
            self.before.reset(torch.zeros(1), _streams(seed, ("site", site, "before")))
        if self.start is not None and weight is not None and not weight.is_meta:
            for factor, value in zip(self._inner, self.start(weight, self.scale), strict=True):
                factor.assign(value)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., inputs)` to `(..., outputs)`: `multiplier` times the product, after dropout."""
        return self._product(x, self._factors) * self.multiplier

    def accumulate(
        self,
        y: Tensor,
        x: Tensor,
        product: Tensor | None = None,
        gain: Tensor | None = None,
        times: float | None = None,
    ) -> Tensor:
        """`y + self(x)`, with `times` in the place of the `multiplier` if it is given.

        Where the factor allows it, the last product, the multiplier and the sum are one kernel.

        A `needs_base_weight` update also takes the product of the base weight and x, without a bias, and its
        `row_scale`.
        """
        times = self.multiplier if times is None else times
        if gain is not None and product is not None:
            return torch.addcmul(torch.addcmul(y, product, gain - 1), self._product(x, self._factors) * times, gain)
        first, *rest = self._factors
        scatter = None
        if isinstance(first, Scatter) and rest:
            scatter, first, *rest = first, *rest
        if first.is_matmul:  # flatten once: each matrix product is then one kernel, without a reshape of its own
            x = x.reshape(-1, self.inputs)
        return first.accumulate(y, self._product(x, rest), times, scatter)

    def _product(self, x: Tensor, factors: list[Factor]) -> Tensor:
        x = self.dropout(x) if self.probability else x
        return reduce(lambda value, factor: factor(value), reversed(factors), x)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """ΔW, dense `(outputs, inputs)` with the scale and without dropout, in float32 or better, differentiable.

        A `needs_base_weight` update takes the adapted rows of the base weight, `(rows, inputs)`; others ignore
        `weight`.
        """
        if self.reweight is None:
            return self.multiplier * _dense(self._factors)
        assert weight is not None, "an update that depends on the base weight needs it"
        product = self.multiplier * _dense(self._inner)
        delta: Tensor = self.reweight(weight.to(product.dtype), product)
        first = self._factors[0]
        return first.times(delta) if isinstance(first, Scatter) else delta

    def to_lora(self) -> tuple[Tensor, Tensor]:
        """A plain LoRA pair equal to the update: A `(r, inputs)` and B `(outputs, r)` with `B @ A` equal to `delta()`.

        The chain is cut at its narrowest inner width r, and B includes the scale. Nothing is approximated: if every
        inner width is large, so is r. Raises `AdapterError` for a single factor, which has no inner width, and for an
        update that depends on the base weight.
        """
        self.require_linear("is no LoRA pair")
        if self.needs_base_weight:
            raise AdapterError(
                f"An update by {type(self.reweight).__name__} depends on the base weight, so it is no LoRA pair. Merge the "
                f"adapter, or store it in graphpeft's own format."
            )
        if len(self._factors) < 2:
            raise AdapterError(
                f"{self._factors[0]} alone has no inner width to cut at, so it is no LoRA pair. "
                "Merge the adapter, or store it in graphpeft's own format."
            )
        return self.pair()

    def pair(self) -> tuple[Tensor, Tensor]:
        """A and B of the product of the factors alone, two at least, without the rest of the update: see `to_lora`."""
        a, b = self._cut()
        return a, self.multiplier * b

    def row_scale(self, weight: Tensor) -> Tensor:
        """The factors, `(outputs,)`, by which a `needs_base_weight` update beside a projection scales its rows."""
        assert self.reweight is not None, "an update that does not depend on the base weight has no row scale"
        return self.reweight.row_scale(self.pair(), widen(weight))

    def require_linear(self, consequence: str) -> None:
        """Raise `AdapterError` if the site's input is transformed: no change of its weight is then equivalent."""
        if self.before is not None:
            raise AdapterError(
                f"{type(self.before).__name__} acts on the site's input, so the adapter {consequence}. Keep it as it is, or "
                f"train one that only rounds weights."
            )

    def lookup(self, ids: Tensor, padding_idx: int | None = None) -> Tensor:
        """The rows `ids` of ΔW, `(*ids.shape, inputs)`: the update of an embedding table, without forming ΔW.

        As in `nn.Embedding`, row `padding_idx` does not propagate gradients to the factors. A single factor does form
        ΔW.
        """
        if len(self._factors) < 2:
            return F.embedding(ids, self.delta(), padding_idx)
        a, b = self._cut()
        return F.embedding(ids, b, padding_idx) @ a * self.multiplier

    def add_rows(self, y: Tensor, ids: Tensor, padding_idx: int | None = None) -> Tensor:
        """`y + lookup(ids)` in the dtype of `y`, summed in the wider one."""
        return (y + self.lookup(ids, padding_idx)).to(y.dtype)

    def _like(self) -> Tensor:
        """A floating-point tensor of the chain, a trained one if there is one."""
        return next(t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point())

    def _cut(self) -> tuple[Tensor, Tensor]:
        """A and B with `scale · B @ A` equal to ΔW, cut at the narrowest inner width."""
        factors = self._factors
        widths = [factor.outputs for factor in factors[1:]]
        cut = 1 + widths.index(min(widths))
        a = _dense(factors[cut:])
        return a, _dense(factors[:cut]).to(a.dtype)  # a Scatter alone has no dtype of its own

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"

    starting = renamed("starting", "with_init_from")
    reweighted = renamed("reweighted", "with_weight_rule")
    reading = renamed("reading", "with_input_transform")
    relative = renamed("relative", "needs_base_weight")
    beside = renamed("beside", "has_side_path")
    gain = renamed("gain", "row_scale")


def _dense(factors: list[Factor]) -> Tensor:
    *left, right = factors
    return reduce(lambda product, factor: factor.times(product), reversed(left), right.matrix())


def _streams(seed: int, names: tuple[str, ...]) -> Callable[[str], np.random.RandomState]:
    return lambda name: generator(seed, *names, name)


Factor.chained = Chain
