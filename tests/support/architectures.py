"""Every model type that transformers maps for a task, built small on the meta device from its default config.

Widths, heads and experts stay as they are by default; only depth is cut, to the shortest prefix of the layers that
still holds a layer of every kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

TASKS = {
    "causal LM": "CAUSAL_LM",
    "classification": "SEQUENCE_CLASSIFICATION",
    "masked LM": "MASKED_LM",
    "seq2seq": "SEQ_TO_SEQ_CAUSAL_LM",
    "image classification": "IMAGE_CLASSIFICATION",
    "audio classification": "AUDIO_CLASSIFICATION",
    "CTC": "CTC",
    "speech seq2seq": "SPEECH_SEQ_2_SEQ",
    "dual encoder": "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "vision-language": "IMAGE_TEXT_TO_TEXT",
}
DEPTH = re.compile(r"(^|_)(num|n)_.*(layers?|blocks)$|^(en|de)coder_layers$|^(n_layers?|depth|num_layers)$|_layers$")
NOT_DEPTH = re.compile(
    r"conv|feat|adapter|skip|freeze|frozen|capture|dense_|kv_shared|hidden_layers_to|extract|select|mtp|nextn"
)
LAYERS = 2
# What a default config leaves open though the model needs it, or sets so that it cannot be built; and depths at which
# every kind of layer stands, where the config does not list the kinds.
SETTINGS: dict[str, dict[str, Any]] = {
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "reformer": {"is_decoder": True},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "chameleon": {"vocabulary_map": {"<image>": 3}},
    "emu3": {"vocabulary_map": {"<image>": 3, "<|extra_200|>": 4}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4},
    "aya_vision": {"vision_config.num_attention_heads": 16},
    "xmod": {"default_language": "en_XX"},
    "jamba": {"num_hidden_layers": 5, "attn_layer_offset": 1, "attn_layer_period": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "zamba": {"num_hidden_layers": 5, "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid"]},
}
KEPT = {"jamba", "recurrent_gemma", "lfm2_moe", "zamba"}
"""Depths that the settings above give."""


def entries() -> Iterator[tuple[str, str, str]]:
    """(model type, task, class name) of everything that transformers maps for the tasks above."""
    for task, mapping in TASKS.items():
        for model_type, names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            yield model_type, task, names if isinstance(names, str) else names[0]


def build(model_type: str, name: str) -> nn.Module:
    """The model of that class, cut in depth, without weights, in eval mode."""
    cls = getattr(transformers, name)
    config = CONFIG_MAPPING[model_type]()
    for setting, value in SETTINGS.get(model_type, {}).items():
        path, _, attribute = setting.rpartition(".")
        setattr(getattr(config, path) if path else config, attribute, value)
    _complete(config)
    if model_type not in KEPT:
        cut(config)
    if not isinstance(config, cls.config_class):
        config = getattr(config, "text_config", config)
    config.use_cache = False
    with torch.device("meta"):
        return cls(config).eval()


def _complete(config: Any) -> None:
    """Head sizes and counts that a default config leaves open."""
    for part in (config, *(v for v in vars(config).values() if isinstance(v, PreTrainedConfig))):
        heads = vars(part).get("num_attention_heads")
        if heads and vars(part).get("num_key_value_heads", 1) is None:
            part.num_key_value_heads = heads
        if heads and vars(part).get("head_dim", 1) is None:
            part.head_dim = part.hidden_size // heads


def cut(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with few layers, its parts' configs too."""
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            cut(value)
    for name, depth in list(vars(config).items()):
        if isinstance(depth, int) and depth > LAYERS and DEPTH.search(name) and not NOT_DEPTH.search(name):
            _shorten(config, name, depth)
    for name, depths in list(vars(config).items()):
        if name.endswith("depths") and isinstance(depths, (list, tuple)):
            setattr(config, name, type(depths)(min(d, LAYERS) for d in depths))
    return config


def _shorten(config: Any, name: str, depth: int) -> None:
    kinds = {k: v for k, v in vars(config).items() if isinstance(v, (list, tuple)) and len(v) == depth}
    few = LAYERS
    for each in kinds.values():
        while few < depth and len({str(v) for v in each[:few]}) < len({str(v) for v in each}):
            few += 1
    setattr(config, name, few)
    for key, each in kinds.items():
        setattr(config, key, each[:few])
