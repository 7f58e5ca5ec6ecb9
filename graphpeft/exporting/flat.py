"""A model as a function from named tensors to named tensors, the interface that PyTorch and ONNX Runtime share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graphpeft.capturing.capture import Inputs, example_call
from graphpeft.errors import ExportError
from graphpeft.exporting import cache as kv
from graphpeft.exporting.cache import Cache

Axes = Mapping[str, Mapping[int, str]]
"""Names of the dynamic axes of each input."""


@dataclass(frozen=True)
class Flat:
    """A model and its sample call. Tensors of the call are inputs; its other arguments are constants."""

    model: nn.Module
    inputs: Mapping[str, Tensor]
    constants: Mapping[str, Any]
    outputs: tuple[str, ...]
    dropped: tuple[str, ...]
    """Outputs that are not tensors (caches, nested tuples) and are left out."""
    axes: Axes
    positional: tuple[str, ...] = ()
    """Names that the sample call passes by position, because an exported program requires it."""
    cache: Cache | None = None
    """The KV cache, if it is among the inputs and outputs."""
    prefix: str = ""
    """Prefix of the root model's names, if `model` is a wrapper that holds it."""

    @classmethod
    def of(cls, model: nn.Module, given: Inputs = None, *, cached: bool = False, prefix: str = "") -> Flat:
        """Run the model on the given sample inputs, or on inputs made from its config.

        With `cached`, the KV cache of a model that generates becomes part of its inputs and outputs.

        Raises:
            ExportError: the samples do not fit `forward`, or their sizes do not tell the dynamic axes apart.
        """
        signature = inspect.signature(model.forward)
        args, kwargs = example_call(model, given)
        try:
            bound = signature.bind_partial(*args, **kwargs).arguments
        except TypeError as error:
            raise ExportError(f"The sample inputs do not fit {type(model).__name__}.forward: {error}.") from error
        named: dict[str, Any] = {}
        for name, value in bound.items():
            named |= value if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        positional = tuple(bound)[: len(args)]
        inputs = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        constants = {name: value for name, value in named.items() if name not in inputs}
        axes = _axes(inputs)
        cache = None
        if cached and not positional and (continued := kv.continued(model, inputs)):
            cache, inputs = continued
            axes = {name: kv.axes(name) for name in inputs}
            constants |= {"use_cache": True}
            args, kwargs = (), _packed(cache, {**constants, **inputs})
        found = _named(model(*args, **kwargs), cache)
        outputs = tuple(name for name, value in found.items() if isinstance(value, Tensor))
        if not outputs:
            kind = type(model).__name__
            raise ExportError(f"{kind} returns no tensor, but {list(found)}. Wrap it in a module that returns tensors.")
        dropped = tuple(name for name, value in found.items() if name not in outputs and value is not None)
        return cls(model, inputs, constants, outputs, dropped, axes, positional, cache, prefix)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """The model's outputs, as ONNX Runtime would return them."""
        args, kwargs = self.call(inputs)
        found = self.named(self.model(*args, **kwargs))
        return {name: found[name].cpu().numpy() for name in self.outputs}

    def call(self, inputs: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of the sample call, with these tensors."""
        named = {**self.constants, **inputs}
        return tuple(named.pop(name) for name in self.positional), _packed(self.cache, named)

    def named(self, result: Any) -> dict[str, Any]:
        """The model's result by name."""
        return _named(result, self.cache)

    def module(self, parameters: Sequence[str] = ()) -> nn.Module:
        """The model as a module with positional tensors: the inputs, then values of the named parameters.

        An exporter may fold, deduplicate or pack parameters, but not inputs.
        """
        return _Positional(self, tuple(parameters))


class _Positional(nn.Module):
    def __init__(self, flat: Flat, parameters: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.flat, self.replaced = flat.model, flat, parameters

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = dict(zip(self.flat.inputs, tensors, strict=False))
        values = dict(zip(self.replaced, tensors[len(inputs) :], strict=True))
        found = self.flat.named(torch.func.functional_call(self.model, values, *self.flat.call(inputs)))
        return tuple(found[name] for name in self.flat.outputs)


def _packed(cache: Cache | None, named: dict[str, Any]) -> dict[str, Any]:
    if cache is None:
        return named
    past = {name: named.pop(name) for name in cache.inputs}
    return {**named, "past_key_values": cache.pack(past)}


def _named(result: Any, cache: Cache | None = None) -> dict[str, Any]:
    if isinstance(result, Tensor):
        return {"output": result}
    if isinstance(result, Mapping):
        named = dict(result)
        return named | (cache.unpack(named.pop("past_key_values")) if cache else {})
    return {f"output_{i}": value for i, value in enumerate(result)} if isinstance(result, (tuple, list)) else {}


def _axes(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """Dynamic axes: axis 0 where its size equals the first input's is the batch; axis 1 of 2-D integers is a length."""
    batch = next((tensor.shape[0] for tensor in inputs.values() if tensor.ndim), 0)
    lengths: dict[int, str] = {}
    axes: dict[str, dict[int, str]] = {name: {} for name in inputs}
    for name, tensor in inputs.items():
        if tensor.ndim and tensor.shape[0] == batch:
            axes[name][0] = "batch"
        if tensor.ndim == 2 and not tensor.is_floating_point():
            axes[name][1] = lengths.setdefault(tensor.shape[1], f"{name}_sequence" if lengths else "sequence")
    sizes = [batch, *lengths]
    if min(sizes) < 2 or len(set(sizes)) < len(sizes):
        raise ExportError(
            f"Sample inputs have batch size {batch} and lengths {list(lengths)}: sizes must be unequal and at least 2, "
            "or tracing confuses them or treats one as a constant. Pass `inputs` with, say, 2 rows of length 5."
        )
    return axes
