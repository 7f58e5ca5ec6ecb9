"""Every site of the zoo's models, by hand: roles, weights and rows."""

from __future__ import annotations

ATTENTION = {r: f"self_attn.{r}_proj" for r in "qkvo"}
GATED = ATTENTION | {r: f"mlp.{r}_proj" for r in ("gate", "up", "down")}


BERT = {
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
    "o": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense",
}  # fmt: skip


FALCON = {"o": "self_attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}


OUT = ATTENTION | {"o": "self_attn.out_proj"}


FC = {"up": "fc1", "down": "fc2"}


CLIP = OUT | {"up": "mlp.fc1", "down": "mlp.fc2"}


def rows(module: str, **runs: str) -> dict[str, str]:
    return {role: f"{module} {text}" for role, text in runs.items()}


PER_HEAD = {
    "q": "0:16 48:64 96:112 144:160",
    "k": "16:32 64:80 112:128 160:176",
    "v": "32:48 80:96 128:144 176:192",
}


T5 = {r: f"SelfAttention.{r}" for r in "qkvo"}


CROSS_T5 = {f"{r} cross": f"EncDecAttention.{r}" for r in "qkvo"}


TABLE: dict[str, tuple[dict[str, dict[str, str]], dict[str, str]]] = {
    "llama": ({"model.layers.{}": GATED}, {"embed": "model.embed_tokens", "head": "lm_head"}),
    "qwen3": ({"model.layers.{}": GATED}, {"embed": "model.embed_tokens", "head": "lm_head"}),
    "gemma2": ({"model.layers.{}": GATED}, {"embed": "model.embed_tokens = lm_head"}),
    "gpt2": (
        {
            "transformer.h.{}": {
                **rows("attn.c_attn", q="0:64", k="64:128", v="128:192"),
                "o": "attn.c_proj",
                "up": "mlp.c_fc",
                "down": "mlp.c_proj",
            }
        },
        {"embed": "transformer.wte = lm_head"},
    ),
    "gpt_neox": (
        {
            "gpt_neox.layers.{}": {
                **rows("attention.query_key_value", **PER_HEAD),
                "o": "attention.dense",
                "up": "mlp.dense_h_to_4h",
                "down": "mlp.dense_4h_to_h",
            }
        },
        {"embed": "gpt_neox.embed_in", "head": "lm_head"},
    ),
    "phi3": (
        {
            "model.layers.{}": {
                **rows("self_attn.qkv_proj", q="0:64", k="64:96", v="96:128"),
                "o": "self_attn.o_proj",
                **rows("mlp.gate_up_proj", gate="0:96", up="96:192"),
                "down": "mlp.down_proj",
            }
        },
        {"embed": "model.embed_tokens", "head": "lm_head"},
    ),
    "falcon": (
        {"transformer.h.{}": rows("self_attention.query_key_value", q="0:64", k="64:80", v="80:96") | FALCON},
        {"embed": "transformer.word_embeddings = lm_head"},
    ),
    "falcon_new": (
        {
            "transformer.h.{}": FALCON
            | rows("self_attention.query_key_value", q="0:32 64:96", k="32:48 96:112", v="48:64 112:128")
        },
        {"embed": "transformer.word_embeddings = lm_head"},
    ),
    "bloom": (
        {"transformer.h.{}": rows("self_attention.query_key_value", **PER_HEAD) | FALCON},
        {"embed": "transformer.word_embeddings = lm_head"},
    ),
    "bert": (
        {"bert.encoder.layer.{}": BERT},
        {"embed": "bert.embeddings.word_embeddings", "other": "bert.pooler.dense", "head": "classifier"},
    ),
    "roberta": (
        {"roberta.encoder.layer.{}": BERT},
        {"embed": "roberta.embeddings.word_embeddings", "other": "classifier.dense", "head": "classifier.out_proj"},
    ),
    "distilbert": (
        {
            "distilbert.transformer.layer.{}": {
                "q": "attention.q_lin",
                "k": "attention.k_lin",
                "v": "attention.v_lin",
                "o": "attention.out_lin",
                "up": "ffn.lin1",
                "down": "ffn.lin2",
            }
        },
        {"embed": "distilbert.embeddings.word_embeddings", "other": "pre_classifier", "head": "classifier"},
    ),
    "deberta_v2": (
        {
            "deberta.encoder.layer.{}": BERT
            | {r: f"attention.self.{name}_proj" for r, name in zip("qkv", ("query", "key", "value"), strict=True)}
        },
        {"embed": "deberta.embeddings.word_embeddings", "other": "pooler.dense", "head": "classifier"},
    ),
    "albert": (
        {
            "albert.encoder.albert_layer_groups.0.albert_layers.0": {
                "q": "attention.query",
                "k": "attention.key",
                "v": "attention.value",
                "o": "attention.dense",
                "up": "ffn",
                "down": "ffn_output",
            }
        },
        {
            "embed": "albert.embeddings.word_embeddings",
            "other": "albert.encoder.embedding_hidden_mapping_in albert.pooler",
            "head": "classifier",
        },
    ),
    "vit": (
        {"vit.layers.{}": {r: f"attention.{r}_proj" for r in "qkvo"} | {"up": "mlp.fc1", "down": "mlp.fc2"}},
        {"conv": "vit.embeddings.patch_embeddings.projection", "head": "classifier"},
    ),
    "t5": (
        {
            "encoder.block.{}.layer.0": T5,
            "encoder.block.{}.layer.1": {"up": "DenseReluDense.wi", "down": "DenseReluDense.wo"},
            "decoder.block.{}.layer.0": T5,
            "decoder.block.{}.layer.1": CROSS_T5,
            "decoder.block.{}.layer.2": {"up": "DenseReluDense.wi", "down": "DenseReluDense.wo"},
        },
        {"embed": "encoder.embed_tokens = decoder.embed_tokens = lm_head"},
    ),
    "t5_gated": (
        {
            "encoder.block.{}.layer.0": T5,
            "encoder.block.{}.layer.1.DenseReluDense": {"gate": "wi_0", "up": "wi_1", "down": "wo"},
            "decoder.block.{}.layer.0": T5,
            "decoder.block.{}.layer.1": CROSS_T5,
            "decoder.block.{}.layer.2.DenseReluDense": {"gate": "wi_0", "up": "wi_1", "down": "wo"},
        },
        {"embed": "encoder.embed_tokens = decoder.embed_tokens = lm_head"},
    ),
    "whisper": (
        {
            "model.encoder.layers.{}": OUT | FC,
            "model.decoder.layers.{}": OUT
            | {f"{r} cross": m.replace("self_attn", "encoder_attn") for r, m in OUT.items()}
            | FC,
        },
        {"conv": "model.encoder.conv1 model.encoder.conv2", "embed": "model.decoder.embed_tokens = proj_out"},
    ),
    "clip": (
        {"vision_model.encoder.layers.{}": CLIP, "text_model.encoder.layers.{}": CLIP},
        {
            "conv": "vision_model.embeddings.patch_embedding",
            "embed": "text_model.embeddings.token_embedding",
            "head": "visual_projection text_projection",
        },
    ),
    "torch_encoder": (
        {
            "layers.{}": {
                **rows("self_attn.in_proj_weight", q="0:32", k="32:64", v="64:96"),
                "o": "self_attn.out_proj",
                "up": "linear1",
                "down": "linear2",
            }
        },
        {},
    ),
    "hand_written": ({"": {"q": "wq", "k": "wk", "v": "wv", "o": "out"}}, {}),
}


BARE = {"wq", "wk", "wv", "in_proj_weight"}
"""Parameters that no `.weight` names."""


Expected = tuple[str, str, tuple[tuple[int, int], ...] | None]


def outside(name: str) -> list[tuple[str, list[str]]]:
    """(role, the weight's names) of what stands outside of the blocks of a zoo model."""
    places = [(role, place) for role, text in TABLE[name][1].items() for place in text.replace(" = ", "=").split()]
    return [(role, [f"{module}.weight" for module in place.split("=")]) for role, place in places]


def expected(name: str) -> list[Expected]:
    """(role, weight, rows) of every site of a zoo model, by the table."""
    found: list[Expected] = [(role, names[0], None) for role, names in outside(name)]
    for prefix, roles in TABLE[name][0].items():
        for layer in range(2) if "{}" in prefix else [0]:
            for role, text in roles.items():
                module, *runs = text.split()
                path = ".".join(filter(None, (prefix.format(layer), module)))
                leaf = "" if module.rpartition(".")[2] in BARE else ".weight"
                bounds = tuple((int(a), int(b)) for a, b in (run.split(":") for run in runs))
                found.append((role, path + leaf, bounds or None))
    return found
