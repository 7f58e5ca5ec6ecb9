"""What onnxruntime-genai needs beside a decoder's graph: `genai_config.json`, with names, sizes and special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from graphpeft.flat import Flat

KNOWN = {"llama", "gemma", "gemma2", "gemma3_text", "mistral", "phi", "phi3", "qwen2", "qwen3", "olmo", "granite"}
"""Types that onnxruntime-genai names; what it does is the same for every decoder with such inputs."""


def facts(model: nn.Module) -> dict[str, Any]:
    """Special tokens of a model that generates: `eos_token_id` is a list."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return {}
    eos = config.eos_token_id
    found = {
        "eos_token_id": eos if isinstance(eos, list) else [] if eos is None else [eos],
        "pad_token_id": config.pad_token_id,
        "decoder_start_token_id": getattr(config, "decoder_start_token_id", None),
    }
    return {name: value for name, value in found.items() if value is not None}


def write(folder: Path, model: nn.Module, flat: Flat) -> None:
    """Write `genai_config.json` for a decoder with a past; nothing for other models."""
    if flat.cache is None or flat.cache.crossed:
        return
    text = model.config.get_text_config()  # type: ignore[operator, union-attr]
    _, heads, _, width = flat.inputs[flat.cache.inputs[0]].shape
    tokens = facts(model)
    names = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in flat.inputs}
    kinds = ("key", "value")
    config = {
        "model": {
            "type": text.model_type if text.model_type in KNOWN else "llama",
            "bos_token_id": text.bos_token_id or 0,
            "eos_token_id": tokens.get("eos_token_id") or 0,
            "pad_token_id": tokens.get("pad_token_id", 0),
            "vocab_size": text.vocab_size,
            "context_length": getattr(text, "max_position_embeddings", 2048),
            "decoder": {
                "session_options": {"log_severity_level": 3},
                "filename": "model.onnx",
                "head_size": width,
                "hidden_size": text.hidden_size,
                "num_attention_heads": text.num_attention_heads,
                "num_hidden_layers": flat.cache.layers,
                "num_key_value_heads": heads,
                "inputs": names | {f"past_{kind}_names": f"past_key_values.%d.{kind}" for kind in kinds},
                "outputs": {"logits": "logits"} | {f"present_{kind}_names": f"present.%d.{kind}" for kind in kinds},
            },
        },
        "search": {"do_sample": False, "max_length": getattr(text, "max_position_embeddings", 2048),
                   "past_present_share_buffer": False},
    }  # fmt: skip
    (folder / "genai_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
