"""Which projection plays which role, per architecture, told by people and not by the matcher.

The table holds every weight that multiplies an activation, or in which an input looks entries up. Its names and rows
were read off the models' source code:
GPT-2 splits `c_attn` into thirds, GPT-NeoX and BLOOM interleave q, k and v per head, Falcon per group of heads.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from checks import CASES, build, inputs
from zoo import llama

import graphpeft as gp
from graphpeft.capturing.capture import capture
from graphpeft.capturing.normalize import normalize
from graphpeft.match.find import find

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

# Architecture: blocks as (prefix with {} for the layer, {role: module, then its rows if not all}), then what stands
# outside of the blocks, modules that share one weight joined by =.
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
CALLS = {"albert": 2}
"""How often each block's weights are used in one forward pass, where not once: ALBERT has one block for its layers."""
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


@pytest.mark.parametrize(("name", "attn"), CASES)
def test_every_projection_has_its_role_and_its_rows(name: str, attn: str) -> None:
    model = build(name, attn)
    found = gp.sites(model, inputs(name, model))
    listed = [(f"{s.role}{' cross' if s.cross else ''}", s.weight, s.rows) for s in found]
    assert sorted(listed, key=str) == sorted(expected(name), key=str)
    ties = {names[0]: names[1:] for _, names in outside(name)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for site in found:
        stored = parameters[site.weight].shape
        full, width = stored[::-1] if site.transposed else (stored[0], stored[1:].numel())
        assert (site.full, site.inputs) == (full, width)
        assert site.outputs == (sum(b - a for a, b in site.rows) if site.rows else full)
        assert site.transposed == (name == "gpt2" and site.role != "embed")
        assert site.stack is None
        assert [t.weight for t in site.tied] == ties.get(site.weight, [])
        assert all(parameters[t.weight] is parameters[site.weight] for t in site.tied)
        inside = site.weight not in ties
        assert site.calls == (CALLS.get(name, 1) if inside else 1 + len(site.tied))
        assert site.form == ("weight" if name == "torch_encoder" or site.role == "conv" else "branch")


def test_the_table_counts_what_people_count() -> None:
    """Totals per architecture, worked out by hand: 2 layers, so 14 sites in Llama, 2 × (6 + 10) in Whisper."""
    block = set("qkvo") | {"gate", "up", "down"}
    counts = {name: Counter(role.split()[0] for role, _, _ in expected(name)) for name in TABLE}
    assert {name: sum(n for role, n in count.items() if role in block) for name, count in counts.items()} == {
        "llama": 14, "qwen3": 14, "gemma2": 14, "gpt2": 12, "gpt_neox": 12, "phi3": 14, "falcon": 12, "falcon_new": 12,
        "bloom": 12, "bert": 12, "roberta": 12, "distilbert": 12, "deberta_v2": 12, "albert": 6, "vit": 12, "t5": 32,
        "t5_gated": 36, "whisper": 32, "clip": 24, "torch_encoder": 12, "hand_written": 4,
    }  # fmt: skip
    rest = {name: {role: n for role, n in sorted(count.items()) if role not in block} for name, count in counts.items()}
    apart, tied = {"embed": 1, "head": 1}, {"embed": 1}  # the head may be the embedding
    pooled = apart | {"other": 1}
    assert rest == {
        "llama": apart, "qwen3": apart, "gemma2": tied, "gpt2": tied, "gpt_neox": apart, "phi3": apart, "falcon": tied,
        "falcon_new": tied, "bloom": tied, "bert": pooled, "roberta": pooled, "distilbert": pooled,
        "deberta_v2": pooled, "albert": apart | {"other": 2}, "vit": {"conv": 1, "head": 1}, "t5": tied,
        "t5_gated": tied, "whisper": tied | {"conv": 2}, "clip": {"conv": 1, "embed": 1, "head": 2},
        "torch_encoder": {}, "hand_written": {},
    }  # fmt: skip


def test_no_role_of_a_block_outside_of_the_blocks() -> None:
    """Heads, poolers, patches and position projections are where a wrong query or MLP would show; the table has none."""
    outer = re.compile(r"classif|pool|patch|pos_|position|rel_emb|lm_head|proj_out|_projection|embed")
    found = [(role, weight) for name in TABLE for role, weight, _ in expected(name)]
    assert {role for role, weight in found if outer.search(weight)} == {"embed", "head", "conv", "other"}
    assert len(found) > 300


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gpt_neox", "falcon", "falcon_new", "bloom", "torch_encoder"])
def test_rows_of_a_fused_projection_partition_it(name: str) -> None:
    by_weight: dict[str, list[tuple[int, int]]] = {}
    for _, weight, runs in expected(name):
        if runs:
            by_weight.setdefault(weight, []).extend(runs)
    model = build(name)
    parameters = dict(model.named_parameters())
    for weight, runs in by_weight.items():
        ordered = sorted(runs)
        ends = [0, *(b for _, b in ordered)]
        assert [a for a, _ in ordered] == ends[:-1]
        assert ends[-1] in parameters[weight].shape


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_roles_do_not_depend_on_node_names(name: str) -> None:
    """Node names, which torch makes from the modules' names, can be anything."""
    model = build(name)
    program = normalize(capture(model))
    for i, node in enumerate(program.graph.nodes):
        node._rename(f"n{i}")
    told = [(s.role, s.weight) for s in find(program).sites]
    assert told == [(s.role, s.weight) for s in gp.sites(model)]


def test_meta_models_have_the_same_sites() -> None:
    with torch.device("meta"):
        shapes_only = llama()
    assert list(gp.sites(shapes_only)) == list(gp.sites(build("llama")))


def test_sites_print_as_a_table_and_slice() -> None:
    found = gp.sites(build("gpt2"))
    lines = str(found).splitlines()
    assert lines[0].split() == ["role", "weight", "rows", "out", "×", "in", "layer", "form", "source"]
    assert lines[1].split()[:2] == ["embed+head", "transformer.wte.weight"]
    assert lines[2].split()[:3] == ["q", "transformer.h.0.attn.c_attn.weight", "0:64"]
    assert len(lines) == 1 + len(found)
    assert [s.role for s in found[:4]] == ["embed", "q", "k", "v"]
    assert str(found[1:2]).splitlines()[1].split()[0] == "q"
