"""A `Factor`: one linear map in an adapter's chain, which can apply itself and give its dense matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphpeft.chain.inits import fill
from graphpeft.chain.transform import stored_tensors
from graphpeft.errors import AdapterError

if TYPE_CHECKING:
    from graphpeft.chain.chain import Chain


def widen(tensor: Tensor) -> Tensor:
    """`tensor` in float32 or better, so that products of factors do not round in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Factor(nn.Module):
    """A linear map from R^inputs to R^outputs. Its tensors are empty until `reset` fills them.

    A subclass defines `forward`, `reset` and `matrix`; everything else has a default. `torch.fx` must be able to trace
    `forward` for activations of any rank: no control flow on shapes, and no expression of buffers alone, which FX would
    evaluate once while tracing.
    """

    chained: ClassVar[type[Chain]]
    """The class `Chain`, the type of a product of factors. chain.py sets it, so that neither file imports the other."""

    def __init__(self, outputs: int, inputs: int, shared: str | None = None) -> None:
        super().__init__()
        self.outputs = outputs
        self.inputs = inputs
        self.shared = shared
        """Name of a factor that all sites of the model share; `None` if each site has its own."""

    def forward(self, x: Tensor) -> Tensor:
        """The map applied to the last axis: `(..., inputs)` to `(..., outputs)`."""
        raise NotImplementedError

    def reset(self, rng: Callable[[str], np.random.RandomState]) -> None:
        """Fill every tensor with its initial values; `rng(name)` is the random stream of the tensor called `name`."""
        raise NotImplementedError

    @property
    def is_matmul(self) -> bool:
        """Whether `accumulate` is a single matrix product, which takes x as a matrix."""
        return False

    def joined(self, pool: dict[str, Any]) -> Factor:
        """This factor; a shared one is replaced by the first of its name, which `pool` holds."""
        found: Factor = pool.setdefault(self.shared, self) if self.shared else self
        return found

    @property
    def macs(self) -> int:
        """Multiply-accumulates per position."""
        return self.outputs * self.inputs

    def saved(self) -> dict[str, Tensor]:
        """The tensors stored in the adapter's file: those that no seed regenerates, without training state."""
        return stored_tensors(self)

    def assign(self, value: Tensor) -> None:
        """Set an initial value that was computed instead of drawn."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        """The map as a dense `(outputs, inputs)` matrix, in float32 or better, differentiable."""
        raise NotImplementedError

    def times(self, other: Tensor) -> Tensor:
        """`matrix() @ other`, for an `other` of shape `(inputs, n)`."""
        return self.matrix() @ other

    def accumulate(self, y: Tensor, x: Tensor, alpha: float, scatter: Scatter | None = None) -> Tensor:
        """`y + alpha * self(x)`, in as few kernels as possible; with `scatter`, `y + alpha * scatter(self(x))`.

        If `is_matmul`, x is `(positions, inputs)`, whatever the shape of y.
        """
        update = self(x) if scatter is None else scatter(self(x))
        return torch.add(y, update, alpha=alpha)

    def __matmul__(self, other: Factor | Chain) -> Chain:
        return self.chained([self]) @ other

    def extra_repr(self) -> str:
        return f"{self.outputs}, {self.inputs}" + (f", shared={self.shared!r}" if self.shared else "")


class Scatter(Factor):
    """Spread features over the wider output of a fused projection, with zeros outside of `rows`.

    `rows` are half-open, increasing runs of the `full` output features; their lengths sum to `inputs`. Raises
    `AdapterError` for runs that are empty, overlap, are out of order or exceed `range(full)`.
    """

    index: Tensor

    def __init__(self, full: int, rows: Iterable[tuple[int, int]]) -> None:
        self.rows = tuple((start, stop) for start, stop in rows)
        bounds = [0, *(bound for run in self.rows for bound in run), full]
        if not self.rows or bounds != sorted(bounds) or any(start == stop for start, stop in self.rows):
            raise AdapterError(
                f"Scatter: rows {self.rows} are not increasing, non-empty half-open runs within 0..{full}. "
                "Usually two sites' rows were joined by hand; take them from gp.sites(model)."
            )
        super().__init__(full, sum(stop - start for start, stop in self.rows))
        self.register_buffer("index", torch.tensor(self._sources()), persistent=False)

    def _sources(self) -> list[int]:
        """For each output feature, the input it copies; `inputs`, one past the last, means zero."""
        sources = [self.inputs] * self.outputs
        features = (feature for run in self.rows for feature in range(*run))
        for source, feature in enumerate(features):
            sources[feature] = source
        return sources

    def reset(self, rng: Callable[[str], np.random.RandomState]) -> None:
        fill(self.index, np.array(self._sources()))

    def expand(self, tensor: Tensor, dim: int) -> Tensor:
        """`tensor` with axis `dim`, counted from the end, widened from `inputs` to `outputs`."""
        skip = (0, 0) * (-1 - dim)
        if len(self.rows) == 1:
            ((start, stop),) = self.rows
            return F.pad(tensor, (*skip, start, self.outputs - stop))
        return F.pad(tensor, (*skip, 0, 1)).index_select(dim, self.index)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(x, -1)

    @property
    def macs(self) -> int:
        return 0

    def matrix(self) -> Tensor:
        return self.times(torch.eye(self.inputs, device=self.index.device))

    def times(self, other: Tensor) -> Tensor:
        return self.expand(other, -2)

    def extra_repr(self) -> str:
        return f"{self.outputs}, rows={self.rows}"
