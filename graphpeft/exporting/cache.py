"""A decoder's key-value cache as plain named tensors, with the names that optimum and onnxruntime-genai use.

transformers keeps the cache in an object. A graph has tensors: `past_key_values.0.key` is an input, `present.0.key` an
output, and one graph serves the prompt (with an empty cache) and every later token.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past", "total"
"""Names of the dynamic axes; `total`, the mask's length, is `past` + `sequence`."""
KINDS = ("key", "value")


@dataclass(frozen=True)
class Cache:
    """A decoder's KV cache: keys and values (batch, heads, length, width) of every layer."""

    layers: int
    crossed: bool = False
    """Whether the decoder has cross-attention. Its keys and values are not cached; each call recomputes them."""

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(f"past_key_values.{i}.{kind}" for i in range(self.layers) for kind in KINDS)

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(f"present.{i}.{kind}" for i in range(self.layers) for kind in KINDS)

    def pack(self, past: Mapping[str, Tensor]) -> Any:
        """The cache object that the model accepts."""
        from transformers import DynamicCache, EncoderDecoderCache

        tensors = [past[name] for name in self.inputs]
        # Without a config every layer keeps the full past; sliding-window layers rely on their mask.
        cache = DynamicCache(list(zip(tensors[::2], tensors[1::2], strict=True)))
        return EncoderDecoderCache(cache, DynamicCache()) if self.crossed else cache

    def unpack(self, cache: Any) -> dict[str, Tensor]:
        """The tensors of the cache object that the model returns."""
        return dict(zip(self.outputs, _tensors(cache), strict=True))

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Cache | None:
        """The cache of a model's result; None if it holds anything but keys and values."""
        cache = result.get("past_key_values")
        try:
            found = list(_tensors(cache))
        except (AttributeError, TypeError):
            return None
        plain = all(isinstance(tensor, Tensor) and tensor.ndim == 4 for tensor in found)
        crossed = hasattr(cache, "cross_attention_cache")
        return cls(len(found) // 2, crossed) if found and plain else None


def _tensors(cache: Any) -> Iterator[Tensor]:
    for layer in getattr(cache, "self_attention_cache", cache).layers:
        yield layer.keys
        yield layer.values


def axes(name: str) -> dict[int, str]:
    """Dynamic axes of a decoder's input."""
    if name.startswith("past_key_values."):
        return {0: BATCH, 2: PAST}
    if name.startswith("encoder_"):
        return {0: BATCH, 1: "encoder_sequence"}
    return {0: BATCH, 1: TOTAL if name == "attention_mask" else SEQUENCE}


def continued(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Cache, dict[str, Tensor]] | None:
    """A decoder's cache, and a call with the same tokens as `inputs` after some cached ones.

    None if the model does not generate, or caches anything but keys and values.
    """
    generates = getattr(model, "can_generate", lambda: False)()
    accepted = inspect.signature(model.forward).parameters
    encoder = {name: value for name, value in inputs.items() if name.startswith("encoder_")}
    known = {"input_ids", "attention_mask", "position_ids", *encoder}
    if not generates or "past_key_values" not in accepted or set(inputs) - known or "input_ids" not in inputs:
        return None
    ids = inputs["input_ids"]
    batch, length = ids.shape
    taken = {batch, length, *(value.shape[1] for value in encoder.values())}
    # Unequal to every other size, so that tracing can tell the axes apart.
    past = next(n for n in range(2, 100) if n not in taken and n + length not in taken)
    first = model(input_ids=ids.repeat(1, past)[:, :past], use_cache=True, **encoder)
    if (cache := Cache.of(first)) is None or cache.crossed != bool(encoder):
        return None
    made = {"input_ids": ids} | encoder
    if "attention_mask" in accepted:
        made["attention_mask"] = ids.new_ones(batch, past + length)
    if "position_ids" in accepted:
        made["position_ids"] = torch.arange(past, past + length, device=ids.device).repeat(batch, 1)
    return cache, made | dict(zip(cache.inputs, _tensors(first["past_key_values"]), strict=True))
