"""Adapters of stacked weights: one chain for each matrix of a three-dimensional weight, such as a layer's experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from graphpeft.chain.chain import Chain
from graphpeft.errors import AdapterError

T = TypeVar("T")


class Stack(Chain):
    """`n` chains of the same structure, with their tensors stacked along a new first axis; `delta` is `(n, outputs,
    inputs)`.

    Any chain can be stacked, because `torch.vmap` runs the chain's own code on the tensors of each matrix. The stack
    takes the chain over and replaces its tensors by stacks. A factor that sites share stays single and serves all
    matrices.
    """

    def __init__(self, chain: Chain, n: int) -> None:
        super().__init__(chain._factors, chain.scale, chain.probability)
        self.n = n
        self.start, self.reweight, self.before = chain.start, chain.reweight, chain.before
        own = [factor for factor in self._factors if not factor.shared] + ([self.reweight] if self.reweight else [])
        for module in (m for part in own for m in part.modules()):
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    module._parameters[name] = nn.Parameter(torch.stack([tensor.detach()] * n), tensor.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.stack([buffer] * n)

    def reset(self, seed: int, site: str, weight: Tensor | None = None) -> None:
        """Fill every tensor: matrix `e` gets the values that the chain alone would get as the site called `site[e]`.

        `weight` is `(n, outputs, inputs)`.
        """
        for e in range(self.n):
            one = {name: tensor.detach()[e] for name, tensor in self._stacks().items()}
            matrix = None if weight is None else weight[e]
            functional_call(self, one, (partial(super().reset, seed, f"{site}[{e}]", matrix),))

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """ΔW of every matrix, dense `(n, outputs, inputs)`, in float32 or better, differentiable.

        A `needs_base_weight` update takes the adapted rows of the base weights, `(n, rows, inputs)`.
        """
        return self._each(super().delta, *(() if weight is None else (weight,)))

    def to_lora(self) -> tuple[Tensor, Tensor]:
        """The matrices' plain LoRA pairs: A `(n, r, inputs)` and B `(n, outputs, r)`. Raises as `Chain.to_lora`."""
        return self._each(super().to_lora)

    def accumulate(self, y: Tensor, x: Tensor, *_: Tensor | None, times: float | None = None) -> Tensor:  # type: ignore[override]
        """Raises `AdapterError`: only the module knows which matrix multiplies an activation."""
        raise AdapterError(
            "Stacked matrices have no side path of their own: adapt the weight itself (a site of form 'weight'), as "
            "gp.sites lists them."
        )

    def forward(self, compute: Callable[..., T], *values: Tensor) -> T:  # type: ignore[override]
        """Return `compute(*values)`. `functional_call` runs it with one matrix's tensors in place of the stacks."""
        return compute(*values)

    def _each(self, compute: Callable[..., T], *values: Tensor) -> T:
        """Run `compute` on the tensors of every matrix and its part of `values`; stack the results."""

        def one(tensors: dict[str, Tensor], *parts: Tensor) -> T:
            return functional_call(self, tensors, (compute, *parts))

        return torch.vmap(one, randomness="different")(self._stacks(), *values)

    def _stacks(self) -> dict[str, Tensor]:
        common = tuple(f"factors.{place}." for place, factor in enumerate(self._factors) if factor.shared)
        every = (*self.named_parameters(), *self.named_buffers())
        return {name: tensor for name, tensor in every if not name.startswith(common)}

    def extra_repr(self) -> str:
        return f"{self.n} matrices, {super().extra_repr()}"
