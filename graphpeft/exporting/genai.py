"""Write `genai_config.json`, the names, sizes and special tokens that onnxruntime-genai needs beside a decoder's graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from graphpeft.exporting.flat import Flat
from graphpeft.files import atomic

KNOWN = {"llama", "gemma", "gemma2", "gemma3_text", "mistral", "phi", "phi3", "qwen2", "qwen3", "olmo", "granite"}
"""Model types that onnxruntime-genai knows. It treats all decoders with these inputs alike, so others pass as llama."""


def facts(model: nn.Module) -> dict[str, Any]:
    """A generating model's special tokens, `eos_token_id` as a list; tokens outside of its vocabulary are left out."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return {}
    size = model.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    found = {"pad_token_id": config.pad_token_id, "decoder_start_token_id": config.decoder_start_token_id}
    known = {name: token for name, token in found.items() if _in(token, size)}
    return known | {"eos_token_id": [token for token in eos if _in(token, size)]}


def _in(token: int | None, size: int) -> bool:
    return token is not None and 0 <= token < size


def write(folder: Path, model: nn.Module, flat: Flat) -> None:
    """Write `genai_config.json` for a decoder with a KV cache; do nothing for other models."""
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
            "bos_token_id": text.bos_token_id if _in(text.bos_token_id, text.vocab_size) else 0,
            "eos_token_id": tokens.get("eos_token_id", []),
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
    atomic.write(folder / "genai_config.json", (json.dumps(config, indent=1) + "\n").encode())
