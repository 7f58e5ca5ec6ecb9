"""PEFT's tensor layout, which depends on the kind of module that holds the adapted weight.

| kind | tensors |
|---|---|
| linear | `lora_A.weight` (r, in), `lora_B.weight` (out, r), also where the weight itself is stored (in, out) |
| embedding | `lora_embedding_A` (r, entries), `lora_embedding_B` (width, r): the transposed table is the matrix |
| conv | `lora_A.weight` (r, in, *kernel), `lora_B.weight` (out, r, 1...) |
| parameter | as linear, for a bare parameter or a stack: `lora_A.weight` (n · r, in), `lora_B.weight` (out, r · n) |

A parameter's keys do not contain its name. PEFT wraps a module once per adapted parameter; the one registered first is
innermost, and its key has one `base_layer` for each wrapper around it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from graphpeft.compat.quantized import shape as float_shape
from graphpeft.ir.site import Site
from graphpeft.ir.weights import get_parameter
from graphpeft.rewrite.adapters import Adapters

PREFIX = "base_model.model."
BANK = "base_model"
"""Prefix of the keys of VeRA's shared projections."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MAGNITUDE = "lora_magnitude_vector"


class NoEquivalent(Exception):
    """PEFT has no equivalent of an adapter at a weight; the message says why."""


@dataclass(frozen=True)
class PeftWeight:
    """A weight as PEFT addresses it."""

    kind: Literal["linear", "embedding", "conv", "parameter"]
    target: str
    """Its name in the config: the path of the module or of the parameter."""
    prefix: str
    """Prefix of its tensors' keys."""
    shape: tuple[int, ...]
    """Shape of the stored weight."""
    swapped: bool = False
    """Whether the stored parameter is transposed relative to PEFT's assumption, which swaps A and B."""

    def laid(self, a: Tensor, b: Tensor, magnitude: Tensor | None = None) -> dict[str, Tensor]:
        """PEFT's tensors by key, from A (r, in) and B (out, r), or stacks of them, and m (out)."""
        if self.kind == "embedding":
            return self._keys("lora_embedding_A", b.t(), "lora_embedding_B", a.t())
        if self.kind == "conv":
            kernel = self.shape[2:]
            a, b = a.reshape(len(a), -1, *kernel), b.reshape(*b.shape, *(1 for _ in kernel))
        elif self.kind == "parameter":
            a, b = (b.mT, a.mT) if self.swapped else (a, b)
            a, b = (a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)) if a.dim() == 3 else (a, b)
        made = self._keys("lora_A.weight", a, "lora_B.weight", b)
        if magnitude is not None:
            shape = (1, -1, *(1 for _ in self.shape[2:])) if self.kind == "conv" else (-1,)
            made[f"{self.prefix}.{MAGNITUDE}"] = magnitude.reshape(shape)
        return made

    def _keys(self, one: str, a: Tensor, other: str, b: Tensor) -> dict[str, Tensor]:
        return {f"{self.prefix}.{one}": a, f"{self.prefix}.{other}": b}

    def read(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The inverse of `laid`: A and B."""
        if self.kind == "embedding":
            return tensors[f"{self.prefix}.lora_embedding_B"].t(), tensors[f"{self.prefix}.lora_embedding_A"].t()
        a, b = tensors[f"{self.prefix}.lora_A.weight"], tensors[f"{self.prefix}.lora_B.weight"]
        if self.kind == "conv":
            return a.flatten(1), b.flatten(1)
        if self.kind == "parameter":
            if len(self.shape) == 3:
                n = self.shape[0]
                a, b = a.unflatten(0, (n, -1)), b.unflatten(1, (-1, n)).permute(2, 0, 1)
            a, b = (b.mT, a.mT) if self.swapped else (a, b)
        return a, b


def place(model: nn.Module, site: Site, nested: Mapping[str, str]) -> PeftWeight:
    """How PEFT would adapt a site's weight; `nested` is the result of `nesting`. Raises `NoEquivalent`."""
    path, _, leaf = site.weight.rpartition(".")
    module, weight = model.get_submodule(path), get_parameter(model, site.weight)
    shape = float_shape(weight, module)
    if isinstance(model, fx.GraphModule):
        if leaf != "weight" or weight.dim() != 2:
            raise NoEquivalent("it is not the weight of a linear map or a table")
        return PeftWeight("embedding" if site.role == "embed" else "linear", path, PREFIX + path, shape)
    if bare(module, leaf):
        return _parameter(module, site, path, shape, nested)
    if isinstance(module, nn.Linear) and site.form == "weight":
        raise NoEquivalent(
            "the module around it reads the weight itself and never calls the module that PEFT would replace"
        )
    if isinstance(module, CONVOLUTIONS):
        odd = module.groups != 1 or set(module.dilation) != {1} or module.padding_mode != "zeros"
        if odd:
            raise NoEquivalent("PEFT adapts only convolutions without groups, dilation and special padding")
        return PeftWeight("conv", path, PREFIX + path, shape)
    if isinstance(module, nn.Embedding):
        code = getattr(module, "base_class", type(module)).forward
        if code is not nn.Embedding.forward and not hasattr(module, "embed_scale"):
            raise NoEquivalent(f"{type(module).__name__} does more than look up rows, and PEFT would skip the rest")
        return PeftWeight("embedding", path, PREFIX + path, shape)
    return PeftWeight("linear", path, PREFIX + path, shape)


def _parameter(
    module: nn.Module, site: Site, path: str, shape: tuple[int, ...], nested: Mapping[str, str]
) -> PeftWeight:
    if isinstance(module, nn.MultiheadAttention):
        raise NoEquivalent("PEFT adapts nn.MultiheadAttention only as a whole")
    if not path:
        raise NoEquivalent("PEFT adapts parameters of submodules, not of the model itself")
    if len(shape) != (3 if site.stack else 2):
        raise NoEquivalent(f"PEFT adapts matrices and stacks of them, and this has shape {shape}")
    rows_first = bool(site.stack) and bool(getattr(module, "is_transposed", False))
    prefix = PREFIX + nested.get(site.weight, path)
    return PeftWeight("parameter", site.weight, prefix, shape, swapped=site.transposed != rows_first)


def bare(module: nn.Module, leaf: str) -> bool:
    """Whether PEFT must target the parameter rather than its module."""
    return leaf != "weight" or not (isinstance(module, (nn.Linear, nn.Embedding, *CONVOLUTIONS)) or conv1d(module))


def conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, a linear map whose weight is (in, out)."""
    return any((c.__name__, c.__module__) == ("Conv1D", "transformers.pytorch_utils") for c in type(module).__mro__)


def modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The base model's modules, each under its first name, in PEFT's order."""
    ours: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, Adapters):
            ours.append(f"{path}.")
        elif not path.startswith(tuple(ours)):
            yield path, module


def nesting(model: nn.Module, targets: Collection[str]) -> dict[str, str]:
    """For every parameter whose name is or ends with a target: its module's path plus its key's `base_layer` parts."""
    found = {}
    for path, module in modules(model):
        names = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
        names = [name for name in names if name in targets or name.endswith(tuple(f".{each}" for each in targets))]
        for depth, name in enumerate(reversed(names)):
            found[name] = path + ".base_layer" * depth
    return found


def shapes(site: Site, r: int) -> tuple[Tensor, Tensor]:
    """A and B of this rank on the meta device, to derive keys and shapes from."""
    stack = (site.stack,) if site.stack else ()
    outputs = site.full or site.outputs
    return torch.empty(*stack, r, site.inputs, device="meta"), torch.empty(*stack, outputs, r, device="meta")
