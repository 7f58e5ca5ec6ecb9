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
from checks import CASES, build, inputs, sampled
from expected_roles import TABLE, expected, outside
from zoo import llama

import graphpeft as gp
from graphpeft.capturing.capture import capture
from graphpeft.capturing.normalize import normalize
from graphpeft.match.find import find

# Architecture: blocks as (prefix with {} for the layer, {role: module, then its rows if not all}), then what stands
# outside of the blocks, modules that share one weight joined by =.
CALLS = {"albert": 2}
"""How often each block's weights are used in one forward pass, where not once: ALBERT has one block for its layers."""


SPELLED_OUT = {"llama", "gpt2", "bert", "t5", "hand_written"}
EAGER = [case for case in CASES if case[1] == "eager" and (case[0], "sdpa") in CASES and case[0] not in SPELLED_OUT]


@pytest.mark.parametrize("case", sampled(CASES, *EAGER), ids="-".join)
def test_every_projection_has_its_role_and_its_rows(case: tuple[str, str]) -> None:
    name, attn = case
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
