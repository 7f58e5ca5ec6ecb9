"""Quantized base weights: torchao's tensors and bitsandbytes' modules, and the float matrices that they represent.

A torchao weight is a tensor of a special class in an ordinary `nn.Linear`, with the shape and dtype of its dequantized
matrix. A bitsandbytes weight is packed, and only its module can use it, so graphpeft calls the module's own forward
unchanged.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from graphpeft.errors import AdapterError

Library = Literal["torchao", "bitsandbytes"]


def library(weight: Tensor) -> Library | None:
    """The library that quantized this weight; `None` for any other weight. Imports neither package."""
    if type(weight) is Tensor or type(weight) is nn.Parameter:  # torch.compile cannot ask a class for its module
        return None
    package = type(weight).__module__.partition(".")[0]
    if package == "torchao":
        return "torchao"
    # bitsandbytes has floats where it did not pack a weight yet, or keeps it in half precision for training.
    return "bitsandbytes" if package == "bitsandbytes" and not weight.is_floating_point() else None


def packed(module: nn.Module) -> bool:
    """Whether the module is a linear layer of bitsandbytes, whose weight lacks the shape and dtype of its matrix."""
    weight = module._parameters.get("weight")
    return isinstance(module, nn.Linear) and weight is not None and library(weight) == "bitsandbytes"


def shape(weight: Tensor, holder: nn.Module) -> tuple[int, ...]:
    """The shape of the dequantized weight."""
    if packed(holder) and weight is holder._parameters["weight"]:
        return cast(int, holder.out_features), cast(int, holder.in_features)
    return tuple(weight.shape)


class Kept:
    """A packed module without adapters: its rewritten graph calls this, and takes the dequantized weight from it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        base: Any = type(self.module)
        return base.base_class.forward(self.module, x)

    def dequantize(self) -> Tensor:
        return dequantize(cast(Tensor, self.module._parameters["weight"]), self.module)


def dequantize(weight: Tensor | Kept, holder: nn.Module | None = None) -> Tensor:
    """The dequantized weight, `(out, in)`; a float weight is returned as it is. bitsandbytes needs the module too."""
    if isinstance(weight, Kept):
        return weight.dequantize()
    known = library(weight)
    if known is None:
        return weight
    if known == "torchao":
        return weight.detach().dequantize()
    import bitsandbytes as bnb

    kinds: Any = bnb.nn
    if isinstance(weight, kinds.Params4bit):
        if holder is not None:
            _put_back(holder)
        found = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    else:  # the first forward pass moves the scales from the weight to the module's state
        scales = cast(Any, weight).SCB if cast(Any, weight).SCB is not None else cast(Any, holder).state.SCB
        found = bnb.functional.int8_vectorwise_dequant(weight.data, scales)
    return found


def levels(weight: Tensor, holder: nn.Module) -> Tensor | None:
    """The numbers that the codes of a 4-bit weight stand for, before scaling; `None` for any other weight.

    On its first call, the fast kernel of a CPU rounds the scales for good, so only these numbers identify a base.
    """
    if not _fours(holder):
        return None
    import bitsandbytes as bnb

    _put_back(holder)
    state = copy.copy(cast(Any, weight).quant_state)
    state.absmax = torch.ones(math.ceil(math.prod(state.shape) / state.blocksize), device=weight.device)
    state.nested = False
    return bnb.functional.dequantize_4bit(weight.data, state)


FAST = "support_avx512bf16_for_cpu"
"""bitsandbytes' attribute of a 4-bit layer: whether a pass without gradients may permute its weight."""


def hold_order(model: nn.Module) -> tuple[str, ...]:
    """Stop 4-bit layers from permuting their weights; returns the layers that did. Restores weights already permuted.

    A permuted weight does not propagate gradients, even in a later training pass: adapters in earlier layers would
    silently stop learning.
    """
    held = [(path, module) for path, module in model.named_modules() if _fours(module) and getattr(module, FAST, False)]
    for _, module in held:
        setattr(module, FAST, False)
        _put_back(module)
    return tuple(path for path, _ in held)


def release_order(model: nn.Module, held: tuple[str, ...]) -> None:
    """Undo `hold_order`."""
    for path in held:
        setattr(model.get_submodule(path), FAST, True)


def _put_back(module: nn.Module) -> None:
    """Undo the permutation for a CPU's fast kernel, which nothing else can read."""
    if getattr(cast(Any, module._parameters["weight"]).quant_state, "packing_format_for_cpu", False):
        module.state_dict()


def _fours(module: nn.Module) -> bool:
    return packed(module) and hasattr(module._parameters["weight"], "quant_state")


KEPT = "kept"
"""Attribute of an adapted owner that holds its `Kept`."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, kept: Kept) -> Tensor:
    """A packed module's own forward as a graph node that names its weight, so that the matcher finds a projection."""
    return kept(x)


def kept_graph(owner: nn.Module) -> fx.Graph:
    """The graph of a packed owner: one call of its own forward."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight = graph.create_node("get_attr", "weight")
    bias = None if owner._parameters.get("bias") is None else graph.create_node("get_attr", "bias")
    kept = graph.create_node("get_attr", KEPT)
    graph.output(graph.call_function(linear, (x, weight, bias, kept)))
    return graph


def weight_node(projection: fx.Node, weight: fx.Node) -> fx.Node:
    """The node that gives the dequantized weight: for the projection of a packed owner, its `Kept`."""
    return cast(fx.Node, projection.args[3]) if projection.target is linear else weight


class _StandIn(nn.Linear):
    """Replaces a packed layer in a capture; like that layer, it computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


@contextmanager
def in_floats(model: nn.Module) -> Iterator[None]:
    """Give the model float weights inside the context, with the dequantized shapes but without values."""
    modules = list(model.modules())
    packs = {child: _stand_in(child) for child in modules if packed(child)}
    children = [(m._modules, n, c) for m in modules for n, c in m._modules.items() if c in packs]
    weights = [(m._parameters, n, p) for m in modules for n, p in m._parameters.items()
               if p is not None and library(p) == "torchao"]  # fmt: skip
    made = {p: _valueless(tuple(p.shape), p.dtype, p.device) for _, _, p in weights}
    try:
        for held, name, child in children:
            held[name] = packs[child]
        for parameters, name, weight in weights:
            parameters[name] = made[weight]
        yield
    finally:
        for held, name, child in children:
            held[name] = child
        for parameters, name, weight in weights:
            parameters[name] = weight


def _stand_in(module: nn.Module) -> nn.Module:
    weight = cast(Tensor, module._parameters["weight"])
    made = _StandIn(1, 1, bias=False, device="meta").train(module.training)
    made.out_features, made.in_features = shape(weight, module)
    made.weight = _valueless((made.out_features, made.in_features), torch.float32, weight.device)
    made.register_parameter("bias", module._parameters["bias"])
    return made


def _valueless(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """A parameter on the device that takes no memory: a single number, expanded to the shape."""
    return nn.Parameter(torch.zeros((), dtype=dtype, device=device).expand(shape), requires_grad=False)


def quantized(model: nn.Module) -> dict[str, Library]:
    """Every quantized weight of a model by its path, and its library."""
    found = {name: library(p) for name, p in model.named_parameters()}
    return {name: known for name, known in found.items() if known is not None}


def check_gradient_flow(model: nn.Module) -> None:
    """Raise `AdapterError` if a quantized layer does not propagate gradients to its input."""
    tried: set[tuple[str, str]] = set()
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if not isinstance(module, nn.Linear) or weight is None or library(weight) != "torchao" or weight.is_meta:
            continue
        kind = type(weight).__name__, repr(cast(Any, weight).__tensor_flatten__()[1])
        if kind in tried:
            continue
        tried.add(kind)
        with torch.enable_grad():
            x = torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=weight.device, requires_grad=True)
            passes = F.linear(x, weight).requires_grad
        if not passes:
            raise AdapterError(
                f"{path} is quantized by torchao so that it rounds its input too, and does not propagate gradients to its input, "
                f"so adapters in earlier layers would receive only part of theirs. Train on a base with quantized weights alone, "
                f"as by Int8WeightOnlyConfig; gp.load(model, folder) puts the trained adapter on this one."
            )
