"""A transformers model from its name or config alone: modules and shapes on the meta device, no weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphpeft.errors import CaptureError

AUTO = ("PreTraining", "CausalLM", "Seq2SeqLM", "MaskedLM", "ImageTextToText", "ImageClassification",
        "SpeechSeq2Seq", "CTC", "AudioClassification", "ZeroShotImageClassification")  # fmt: skip
"""Auto classes tried in this order for a config without `architectures`; the bare model comes last."""


def skeleton(name: str) -> nn.Module:
    """Build the model of a local folder, of a `config.json`, or of a model type that transformers knows (with its
    defaults).

    Raises `CaptureError` when `name` is none of these, or its model cannot be built.
    """
    config = _config(name)
    build = _class(name, config)
    try:
        with torch.device("meta"):
            model: nn.Module = build(config).eval()
    except Exception as error:
        raise CaptureError(
            f"{name} cannot be built as {build.__name__}: {type(error).__name__}: {error}. Usually its config does not fit "
            f"that class, or needs a package that is not installed. Try from_config in Python, and gp.sites(model)."
        ) from error
    return model


def pretrained(name: str) -> nn.Module:
    """Load the model of a local folder with its weights, in evaluation mode.

    Raises `CaptureError` if the folder does not hold a complete model.
    """
    build = _class(name, _config(name))
    try:
        model: nn.Module = build.from_pretrained(name, local_files_only=True).eval()
    except Exception as error:
        raise CaptureError(f"{name} cannot be loaded as {build.__name__}: {_first(error)}") from error
    return model


def _class(name: str, config: Any) -> Any:
    import transformers

    names = config.architectures or ()
    if not isinstance(names, list | tuple) or not all(isinstance(each, str) for each in names):
        raise CaptureError(
            f"{name} has architectures {str(names)[:40]!r} in its config.json, which must be a list of names."
        )
    found = [getattr(transformers, each, None) if each.isidentifier() else None for each in names]
    classes = [
        c if isinstance(c, type) and issubclass(c, nn.Module) else each for c, each in zip(found, names, strict=True)
    ]
    build = next((c for c in classes if not isinstance(c, str)), None) or (None if classes else _usual(config))
    if build is None:
        raise CaptureError(f"{name} names the architecture {classes[0]!r}, which transformers does not have.")
    return build


def _config(name: str) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    path = Path(name)
    if path.is_file() or (path / "config.json").is_file():
        try:
            # Unless this is set, transformers asks on the terminal whether to run code from the config's folder.
            return _ours(name, AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False))
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(f"{name} holds no config that transformers can read: {_first(error)}") from error
    if name in CONFIG_MAPPING:
        return CONFIG_MAPPING[name]()
    if path.is_dir():
        raise CaptureError(
            f"{name} has no config.json. Pass the folder of a transformers model, as save_pretrained writes it."
        )
    near = get_close_matches(name, list(CONFIG_MAPPING), 1)
    raise CaptureError(
        f"{name} is neither a folder, nor a config.json, nor a model type of transformers"
        + (f". Did you mean {near[0]}?" if near else " such as llama or bert.")
    )


def _ours(name: str, config: Any) -> Any:
    """Return the config if its attention is transformers' own: any other names a repository of kernels to download."""
    for part in _parts(config):
        asked = getattr(part, "_attn_implementation", None)
        if asked is not None and not (isinstance(asked, str) and re.fullmatch(r"[\w|]+", asked)):
            raise CaptureError(
                f"{name} asks for the attention {str(asked)[:60]!r} in its config.json, which transformers does not have. "
                f"Remove attn_implementation from the config."
            )
    return config


def _parts(config: Any) -> Iterator[Any]:
    """A config and all nested configs."""
    waiting = [config]
    while waiting:
        part = waiting.pop()
        if hasattr(part, "to_dict"):
            yield part
            waiting += vars(part).values()
        elif isinstance(part, dict | list | tuple):
            waiting += part.values() if isinstance(part, dict) else part


def _usual(config: Any) -> Any:
    """The model class that transformers maps the config to."""
    import transformers

    for suffix in (*(f"For{task}" for task in AUTO), ""):
        mapping = getattr(transformers, f"AutoModel{suffix}")._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise CaptureError(
        f"transformers has no model class for the config of {config.model_type!r} alone. Pass the config of a whole model."
    )


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
