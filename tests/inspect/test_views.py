"""What users see: plan, sites, explain, diff. Compared as text, for text is what they are for."""

from __future__ import annotations

import pytest
import torch
from checks import build
from zoo import gpt2, llama, t5, torch_encoder

import graphpeft as gp
from graphpeft.errors import AdapterError
from graphpeft.inspect.table import layers_text, rows_text

GPT2_DIFF = """\
transformer.h.*.attn.c_attn
 %view_1 = view(%x_2, -1, %size_3)
 %addmm_4 = addmm(bias, %view_1, weight)
-%view_5 = view(%addmm_4, %add_6)
+%linear_7 = linear(%view_1, default.v[2].weight)
+%pad_8 = pad(default.v[1].weight, [0, 0, 128, 0], mode=constant, value=None)
+%reshape_9 = reshape(%addmm_4, -1, 192)
+%reshape_10 = reshape(%linear_7, -1, 8)
+%t_11 = t(%pad_8)
+%addmm_12 = addmm(%reshape_9, %reshape_10, %t_11, alpha=1.0)
+%view_as_13 = view_as(%addmm_12, %addmm_4)
+%view_5 = view(%view_as_13, %add_6)
 return %view_5
  × 2, layers 0-1"""

ENCODER_DIFF = """\
layers.*.self_attn
-in_proj_weight
+in_proj_weight + delta(default.in_proj_weight_q)
  × 2, layers 0-1"""


def test_diff_shows_a_fused_projection_once_for_all_layers() -> None:
    model = gpt2()
    gp.apply(model, "v:lora")
    assert str(gp.diff(model)) == GPT2_DIFF


def test_diff_of_a_whole_graph_is_folded_too() -> None:
    model = gpt2().eval()
    tokens = torch.randint(3, 100, (2, 7))
    exported = torch.export.export(model, (), {"input_ids": tokens, "use_cache": False}, strict=False)
    shown = gp.diff(gp.apply(exported, "qv:lora"))
    assert shown.hunks == 1
    assert "× 2, layers 0-1" in str(shown)
    assert "default.transformer_h_*_attn_c_attn_q[2].weight" in str(shown)


def test_diff_of_the_weight_form() -> None:
    model = torch_encoder()
    gp.apply(model, "q:lora", inputs=torch.randn(2, 7, 32))
    assert str(gp.diff(model)) == ENCODER_DIFF


def test_diff_is_empty_when_nothing_runs_and_leaves_the_model_as_it_was() -> None:
    model = llama()
    gp.apply(model, "qv:lora")
    classes = [type(m) for m in model.modules()]
    assert gp.diff(model).hunks == 2
    assert [type(m) for m in model.modules()] == classes
    gp.activate(model, None)
    assert str(gp.diff(model)) == ""


def test_plan_prints_sites_counts_and_what_was_skipped() -> None:
    text = str(gp.plan(gpt2(), "qv[layers=1]:lora(r=4)"))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[2].startswith(
        "q transformer.h.1.attn.c_attn.weight 0:64 64 × 64 lora(r=4) branch 512 modeling_gpt2.py:"
    )
    assert lines[3].startswith(
        "v transformer.h.1.attn.c_attn.weight 128:192 64 × 64 lora(r=4) branch 512 modeling_gpt2.py:"
    )
    base = sum(p.numel() for p in gpt2().parameters())
    assert lines[4] == f"2 sites, 1,024 trainable of {base + 1024:,} parameters ({100 * 1024 / (base + 1024):.3f} %)"
    assert "skipped 1 × q: layer 0 outside 1" in lines
    assert "skipped 2 × k: no rule names this role" in lines
    assert "skipped 1 × embed+head: no rule names this role" in lines
    plain = str(gp.plan(build("bert"), "qv:lora")).splitlines()
    assert "skipped 1 × other: a projection without a role" in plain


def test_plan_counts_what_apply_then_trains() -> None:
    for rules in ("qv:rlora", "linear:lora(r=3)", "q[cross]:lora; mlp:rlora(r=16)"):
        model = t5()
        plan = gp.plan(model, rules)
        gp.apply(model, rules)
        assert (plan.trainable, plan.total) == gp.trainable(model)


def test_sites_print_as_a_table_with_cross_attention_named() -> None:
    sites = gp.sites(t5())
    text = str(sites)
    assert len(text.splitlines()) == len(sites) + 1
    assert "q cross" in text
    assert [s.role for s in sites[:2]] == ["embed", "q"]
    assert len(sites[:3]) == 3


def test_explain_folds_layers_and_says_how_far_they_moved() -> None:
    model = llama(layers=3)
    gp.apply(model, "qv:lora(r=4)", name="task")
    text = str(gp.explain(model))
    assert text.startswith("task (active): qv:lora(r=4)  —  6 sites, ")
    assert text.count("× 3, layers 0-2") == 2
    assert len(str(gp.explain(model, fold=False)).splitlines()) == 8
    chain = model.model.layers[1].self_attn.q_proj.adapters.task.q
    with torch.no_grad():
        chain.factors[0].weight.normal_()
    weight = model.model.layers[1].self_attn.q_proj.weight
    ratio = float((chain.factors[0].weight @ chain.factors[1].weight).detach().norm() / weight.detach().norm())
    assert f"{ratio:.2g}" in str(gp.explain(model))
    gp.merge(model)
    assert "task (merged)" in str(gp.explain(model))
    gp.unmerge(model)
    gp.activate(model, None)
    assert "task (resting)" in str(gp.explain(model))


@pytest.mark.parametrize("view", [gp.explain, gp.diff])
def test_views_of_a_model_without_adapters_say_what_to_do(view: object) -> None:
    with pytest.raises(AdapterError, match=r"no adapters.*gp\.apply"):
        view(llama())  # type: ignore[operator]


def test_short_forms() -> None:
    assert rows_text(None) == "all"
    assert rows_text(((0, 2), (4, 6))) == "0:2 4:6"
    assert rows_text(((0, 2), (4, 6), (8, 10))) == "0:2 … 8:10 (3 runs)"
    assert layers_text([0, 1, 2, 5]) == "× 4, layers 0-2,5"
    assert layers_text([None]) == ""
    assert layers_text([4]) == "layer 4"


def test_positional_inputs_are_captured_without_the_cache() -> None:
    tokens = torch.randint(3, 100, (2, 7))
    assert len(gp.sites(gpt2(), (tokens,))) == len(gp.sites(gpt2())) == len(gp.sites(gpt2(), tokens))
