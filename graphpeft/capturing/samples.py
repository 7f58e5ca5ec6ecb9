"""Sample inputs for a transformers model, made from its config: no data, no tokenizer, no download."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from graphpeft.errors import CaptureError

BATCH, LENGTH, DECODER_LENGTH = 2, 7, 5
"""Unequal and at least 2: torch.export specializes sizes 0 and 1, and equal sizes could be confused with each other."""
FRAMES, SAMPLES = 128, 16000


def sample_inputs(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments that `model.forward` accepts, on the model's device (on the CPU for a meta model)."""
    return next(sample_calls(model))


def sample_calls(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Example calls to try in turn, the likeliest first.

    Batch 2, text length 7, decoder length 5, images and audio at the sizes that the config names.
    Raises `CaptureError` if the model is not a transformers model, or if none of its inputs is known.
    """
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or main is None:
        raise CaptureError(
            f"{type(model).__name__} cannot be captured without inputs: it has no transformers config to make them from. "
            f"Pass an example call, such as inputs=(x,) or inputs={{'x': x}}, with a batch of at least 2."
        )
    accepted = set(inspect.signature(model.forward).parameters)
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    calls: list[dict[str, Any]] = []
    for made in _calls(main, config, accepted):
        known = {k: v for k, v in made.items() if k in accepted}
        if known and _shapes(known) not in map(_shapes, calls):
            calls.append(known)
            yield {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in known.items()}
    if not calls:
        raise CaptureError(
            f"{type(model).__name__}.forward takes none of the inputs that its config suggests ({main}). "
            f"Pass an example call as inputs={{'{main}': ...}}."
        )


def without_cache(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same call with the key-value cache off, if the model has one: the graph is then a plain function."""
    if "use_cache" in inspect.signature(model.forward).parameters:
        return {**kwargs, "use_cache": False}
    return kwargs


@contextlib.contextmanager
def analysis_config(model: nn.Module) -> Iterator[None]:
    """Set the model's configs for a capture; restored on exit.

    The cache is off everywhere. There is a padding token, because a classifier of generated text refuses a batch of two
    without one, though no token is padding here. And experts are one grouped product, because a loop over the chosen
    experts has no single graph.
    """
    configs = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "to_dict")}
    wanted: dict[str, tuple[Any, Any]] = {
        "use_cache": (True, False),
        "pad_token_id": (None, 0),
        "_experts_implementation": ("eager", "grouped_mm"),
    }
    held: list[tuple[Any, str, Any]] = []
    try:
        for config in configs.values():
            for name, (old, new) in wanted.items():
                if getattr(config, name, new) == old:
                    held.append((config, name, old))
                    setattr(config, name, new)
        yield
    finally:
        for config, name, old in held:
            setattr(config, name, old)


def _calls(main: str, config: Any, accepted: set[str]) -> Iterator[dict[str, torch.Tensor]]:
    yield from _packed(config, accepted)
    if main not in accepted:
        main = next((name for name in _SENSES if name in accepted), main)
    if "input_ids" in accepted:
        text = {"input_ids": _ids(config, LENGTH), "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long)}
        decoder = {"decoder_input_ids": _decoder_ids(config)}
        seen = {n: t for n, make in _SENSES.items() if n in accepted and n != main for t in make(config)[:1]}
        # If a token of the text represents the image, text alone is a valid call: try it first.
        for extra in ({}, seen) if _placed(config) else (seen, {}):
            for more in (decoder, {}) if "decoder_input_ids" in accepted else ({},):
                yield text | extra | more | _companions(config, accepted)
                yield {"input_ids": text["input_ids"]} | extra | more
        if (books := _known(config, "num_codebooks", default=None)) is not None:  # text and sound in one sequence
            yield {"input_ids": text["input_ids"][..., None].repeat(1, 1, books + 1)}
    if main in _SENSES:
        ids = {"decoder_input_ids": _decoder_ids(config)} if "decoder_input_ids" in accepted else {}
        for tensor in _SENSES[main](config):
            yield {main: tensor} | ids
            yield {main: tensor}


def _placed(config: Any) -> bool:
    kinds = (f"{sense}_token_{key}" for sense in ("image", "video", "audio") for key in ("id", "index"))
    return any(getattr(config, kind, None) is not None for kind in kinds)


def _companions(config: Any, accepted: set[str]) -> dict[str, torch.Tensor]:
    """Inputs that a text model needs besides the text."""
    return {"bbox": torch.zeros(BATCH, LENGTH, 4, dtype=torch.long)} if "bbox" in accepted else {}


def _packed(config: Any, accepted: set[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs of parts that take more than one tensor: images as a row of patches, queries over features."""
    side = 4
    patch, channels = (
        _known(config, "patch_size", default=None),
        _known(config, "in_channels", "num_channels", default=3),
    )
    grid = next((n for n in ("grid_thw", "image_grid_thw") if n in accepted), None)
    if isinstance(patch, int) and grid is not None and "input_ids" not in accepted:
        frames = _known(config, "temporal_patch_size", default=1)
        name = next((n for n in ("hidden_states", "pixel_values") if n in accepted), "x")
        patches = torch.randn(BATCH * side * side, channels * frames, patch, patch, generator=_generator())
        for row in (patches.flatten(1), patches, patches[None]):
            yield {name: row, grid: torch.tensor([[1, side, side]] * BATCH)}
    if "aspect_ratio_ids" in accepted and "input_ids" not in accepted:
        tiles = _known(config, "max_num_tiles", default=4)
        pictures = _images(config)[0][:, None, None].repeat(1, 1, tiles, 1, 1, 1)
        seen = torch.ones(BATCH, 1, tiles, dtype=torch.long)
        yield {"pixel_values": pictures, "aspect_ratio_ids": seen[..., 0], "aspect_ratio_mask": seen}
    if "feature_lens" in accepted:
        spectrum = torch.cat(list(_spectra(config)[0][..., :100]), dim=-1)
        yield {"input_features": spectrum, "feature_lens": torch.tensor([100] * BATCH)}
    if isinstance(patch, int) and "spatial_shapes" in accepted:
        row = torch.randn(BATCH, side * side, channels * patch * patch, generator=_generator())
        mask = {n: torch.ones(BATCH, side * side, dtype=torch.long) for n in ("pixel_attention_mask", "attention_mask")}
        yield {"pixel_values": row, "spatial_shapes": torch.tensor([[side, side]] * BATCH)} | mask
    width = _known(config, "hidden_size", default=None)
    if width is not None and "query_embeds" in accepted:
        features = torch.randn(BATCH, 9, _known(config, "encoder_hidden_size", default=width), generator=_generator())
        queries = torch.randn(BATCH, LENGTH, width, generator=_generator())
        yield {"query_embeds": queries, "encoder_hidden_states": features}
    if "hidden_states" in accepted and (width := _known(config, "input_dim", default=None)) is not None:
        yield {"hidden_states": torch.randn(BATCH, FRAMES, width, generator=_generator())}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _ids(config: Any, length: int) -> torch.Tensor:
    text = config.get_text_config()
    vocabulary = _known(text, "vocab_size", default=_known(config, "vocab_size", default=256))
    # Low ids are special tokens in most vocabularies, and padding would be masked away.
    return torch.randint(min(3, vocabulary - 1), vocabulary, (BATCH, length), generator=_generator())


def _decoder_ids(config: Any) -> torch.Tensor:
    """Tokens of the decoder, in as many channels as it generates at once."""
    channels = getattr(_part(config, "decoder_config"), "num_channels", None)
    ids = _ids(config, DECODER_LENGTH)
    return ids if channels is None or not hasattr(config, "decoder_config") else ids[..., None].repeat(1, 1, channels)


def _images(config: Any) -> list[torch.Tensor]:
    """Whole images; then several tiles of each, and a row of flattened patches."""
    vision = _part(config, "vision_config", "encoder", "backbone_config")
    size = _known(vision, "image_size", "input_size", default=_known(config, "image_size", default=224))
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = _known(vision, "num_channels", "in_channels", "in_chans", default=3)
    whole = torch.randn(BATCH, channels, height, width, generator=_generator())
    made = [whole, whole[:, None].repeat(1, 2, 1, 1, 1)]
    patch = _known(vision, "patch_size", default=None)
    if isinstance(patch, int):
        made.append(torch.randn(BATCH, 16, channels * patch * patch, generator=_generator()))
    return made


def _videos(config: Any) -> list[torch.Tensor]:
    vision = _part(config, "vision_config")
    frames = _known(vision, "num_frames", default=4)
    return [image[:, None].repeat(1, frames, 1, 1, 1) for image in _images(config)[:1]]


def _spectra(config: Any) -> list[torch.Tensor]:
    """Spectrograms: bins before frames, as convolutions read them, then frames before bins."""
    audio = _part(config, "audio_config", "encoder_config", "encoder")
    names = ("feature_projection_input_dim", "input_dim", "num_mel_bins", "input_feat_per_channel", "feature_size")
    bins = _known(audio, *names, default=_known(config, *names, default=80))
    positions = _known(audio, "max_source_positions", default=None)
    frames = 2 * positions if isinstance(positions, int) else FRAMES
    spectrum = torch.randn(BATCH, bins, frames, generator=_generator())
    return [spectrum, spectrum.transpose(1, 2).contiguous()]


def _waves(config: Any) -> list[torch.Tensor]:
    """Audio as samples, or as a spectrogram of the length that the config names."""
    wave = torch.randn(BATCH, SAMPLES, generator=_generator())
    made = [wave, wave[:, None]]
    if hasattr(config, "max_length") and hasattr(config, "num_mel_bins"):
        made.insert(0, torch.randn(BATCH, config.max_length, config.num_mel_bins, generator=_generator()))
    return made


def _bytes(config: Any) -> list[torch.Tensor]:
    """Inputs of models that read any modality under one name: tokens, images or audio."""
    return [_ids(config, LENGTH), *_images(config)[:1], *_waves(config)]


def _patches(config: Any) -> list[torch.Tensor]:
    vision = _part(config, "vision_config")
    return [torch.rand(BATCH, 16, 2 + _known(vision, "patch_embed_hidden_size", default=768), generator=_generator())]


_SENSES: dict[str, Callable[[Any], list[torch.Tensor]]] = {
    "pixel_values": _images,
    "pixel_values_videos": _videos,
    "input_features": _spectra,
    "input_values": _waves,
    "inputs": _bytes,
    "flattened_patches": _patches,
}


def _part(config: Any, *names: str) -> Any:
    return next((part for n in names if hasattr(part := getattr(config, n, None), "to_dict")), config)


def _known(config: Any, *names: str, default: Any) -> Any:
    return next((v for n in names if (v := getattr(config, n, None)) is not None), default)


def _shapes(call: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {k: v.shape for k, v in call.items()}
