"""Sample inputs for a transformers model, made from its config: no data, no tokenizer, no download."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from graphpeft.errors import CaptureError

BATCH, LENGTH, DECODER_LENGTH = 2, 7, 5
"""Unequal and at least 2: torch.export specializes sizes 0 and 1, and equal sizes could be taken for one another."""


def sample_inputs(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments that `model.forward` accepts, on the model's device.

    Batch 2, text length 7, decoder length 5, images and audio at the sizes that the config names.
    Raises `CaptureError` for a model that is not a transformers model.
    """
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or main is None:
        raise CaptureError(
            f"{type(model).__name__} cannot be captured without inputs: it has no transformers config to make them from. "
            f"Pass an example call, such as inputs=(x,) or inputs={{'x': x}}, with a batch of at least 2."
        )
    accepted = inspect.signature(model.forward).parameters
    made: dict[str, Any] = {main: _tensor(main, config)}
    if main == "input_ids":
        made["attention_mask"] = torch.ones_like(made[main])
        if "pixel_values" in accepted and hasattr(config, "vision_config"):
            made["pixel_values"] = _tensor("pixel_values", config)
    if getattr(config, "is_encoder_decoder", False):
        made["decoder_input_ids"] = _ids(config, DECODER_LENGTH)
    made = {k: v for k, v in made.items() if k in accepted}
    if not made:
        raise CaptureError(
            f"{type(model).__name__}.forward takes none of the inputs that its config suggests ({main}). Pass inputs=."
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return {k: v.to(device) for k, v in made.items()}


def without_cache(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same call with the key-value cache off, where the model has one: its graph is then a plain function."""
    if "use_cache" in inspect.signature(model.forward).parameters:
        return {**kwargs, "use_cache": False}
    return kwargs


def _tensor(name: str, config: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if name == "input_ids":
        return _ids(config, LENGTH)
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = vision.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return torch.randn(BATCH, getattr(vision, "num_channels", 3), height, width, generator=generator)
    if name == "input_features":
        return torch.randn(BATCH, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
    if name == "input_values":
        return torch.randn(BATCH, 16000, generator=generator)
    raise CaptureError(f"No sample input is known for {name!r}. Pass an example call as inputs={{'{name}': ...}}.")


def _ids(config: Any, length: int) -> torch.Tensor:
    vocabulary = config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    # Low ids are special tokens in most vocabularies, and padding would be masked away.
    return torch.randint(min(3, vocabulary - 1), vocabulary, (BATCH, length), generator=generator)
