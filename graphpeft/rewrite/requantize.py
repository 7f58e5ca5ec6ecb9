"""Requantize: an update folded into quantized weights, which rounds them anew, and what that rounding costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphpeft.compat.quantized import dequantize, library
from graphpeft.errors import AdapterError
from graphpeft.show.view import Grid, View


@dataclass(frozen=True)
class Rounding:
    """What a weight lost when it was rounded again after the merge."""

    weight: str
    largest: float
    """Largest absolute difference to W + ΔW, in the weight's units."""
    of_weight: float
    """Frobenius norm of the difference relative to that of W + ΔW."""
    of_update: float
    """The same relative to ΔW: from 1 on, rounding moves the weight further than the adapter did."""


@dataclass(frozen=True)
class Requantized(View):
    """The quantized weights that a merge rounded anew; prints as a table."""

    weights: tuple[Rounding, ...]

    def blocks(self) -> Iterator[Grid | str]:
        columns = ("weight", "largest error", "of the weight", "of the update")
        rows = [(r.weight, f"{r.largest:.2g}", f"{r.of_weight:.2g}", f"{r.of_update:.2g}") for r in self.weights]
        yield Grid.of(columns, rows, "rounded anew", right=columns[1:])

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for `json.dumps`."""
        return {"weights": [asdict(r) for r in self.weights]}


def refuse_quantized(names: list[str], known: str) -> None:
    """Raise `AdapterError` for a merge into quantized weights that nobody asked to round."""
    there = f"{names[0]}{f' (and {len(names) - 1} more)' if len(names) > 1 else ''}"
    instead = (
        "Load the base in floats, gp.load(model, folder, any_base=True), merge, and quantize the result; or keep the adapter "
        "unmerged"
    )
    either = "; or pass requantize= with the torchao config that made it." if known == "torchao" else "."
    raise AdapterError(
        f"{there} is quantized by {known}: merging would round it again, which can lose the update. {instead}{either}"
    )


def requantized(name: str, base: Tensor, total: Tensor, config: Any) -> tuple[Tensor, Rounding]:
    """W + ΔW `(out, in)` quantized as `base` is, by a torchao config, and what the rounding costs.

    Raises `AdapterError` if the config makes another kind of tensor.
    """
    from torchao.quantization import quantize_

    layer = nn.Linear(total.shape[1], total.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(total.to(base.dtype), requires_grad=False)
    quantize_(layer, config)
    made = layer.weight.detach()
    if library(made) != "torchao" or _kind(made) != _kind(base):
        raise AdapterError(
            f"{type(config).__name__} makes another kind of tensor of {name} than {_kind(base)[0]} with its settings. Pass the "
            f"config that the model was quantized by; the model is unchanged."
        )
    error = dequantize(made).to(total.dtype) - total
    update = total - dequantize(base).to(total.dtype)
    lost = float(torch.linalg.norm(error))
    ratios = (lost / float(torch.linalg.norm(one).clamp_min(1e-30)) for one in (total, update))
    return made, Rounding(name, float(error.abs().max()), *ratios)


def _kind(weight: Tensor) -> tuple[str, str]:
    """Class and settings of a quantized tensor, by torch's protocol for tensors that are made of others."""
    flatten = getattr(weight, "__tensor_flatten__", None)
    return type(weight).__name__, repr(flatten()[1]) if flatten else ""
