"""What users see: plan, sites, explain. Compared as text, for text is what they are for; `test_diff.py` has diff."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch
from checks import build
from rich.console import Console
from zoo import gpt2, llama, t5

import graphpeft as gp
from graphpeft.errors import AdapterError
from graphpeft.show.folding import layers_text
from graphpeft.show.sites import rows_text


def test_plan_prints_sites_counts_and_what_was_skipped() -> None:
    text = str(gp.plan(gpt2(), "qv[layers=1]:lora(r=4)"))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[2].startswith(
        "q transformer.h.1.attn.c_attn.weight 0:64 64 × 64 lora(r=4) branch 4 512 modeling_gpt2.py:"
    )
    assert lines[3].startswith(
        "v transformer.h.1.attn.c_attn.weight 128:192 64 × 64 lora(r=4) branch 4 512 modeling_gpt2.py:"
    )
    base = sum(p.numel() for p in gpt2().parameters())
    assert lines[4] == f"2 sites, 1,024 trainable of {base + 1024:,} parameters ({100 * 1024 / (base + 1024):.3f} %)"
    assert lines[5:7] == ["rule matched skipped rejected", "qv[layers=1]:lora(r=4) 2 2 0"]
    assert "skipped 1 × q: layer 0 outside 1" in lines
    assert "skipped 2 × k: no rule names this role" in lines
    assert "skipped 1 × embed+head: no rule names this role" in lines
    plain = str(gp.plan(build("bert"), "qv:lora")).splitlines()
    assert "skipped 1 × other: a projection without a role" in plain


def test_plan_folds_equal_layers_unless_told_not_to() -> None:
    model = llama(layers=5)
    folded, whole = (str(gp.plan(model, "qv[layers=1-4]:lora", fold=fold)) for fold in (True, False))
    assert folded.count("q_proj.weight") == 1
    assert "× 4, layers 1-4" in folded
    assert "skipped 1 × q: layer 0 outside 1-4" in folded
    assert whole.count("q_proj.weight") == 4
    assert "skipped 3 × q: layers 2-4 outside 0-1" in str(gp.plan(model, "q[layers=0-1]:lora"))


def test_a_plan_says_which_roles_of_a_rule_were_rejected() -> None:
    text = str(gp.plan(gpt2(), "mlp:lora"))
    assert re.search(r"^mlp:lora +4 +0 +1$", text, re.M)
    assert "rejected `mlp:lora`, gate: matched without it: its mlp has up and down but no gate" in text


def test_views_are_html_in_a_notebook_and_colors_on_a_console() -> None:
    model = gp.apply(llama(), "qv[layers=0]:lora", name="a")
    html = gp.plan(llama(), "q:lora", fold=False)._repr_html_()
    assert html.count("<tr>") == (1 + 2) + (1 + 1)  # sites, and a line for the rule
    assert "<td style" in html
    diff = gp.diff(model)
    assert diff._repr_html_().count("color:#1a7f37") == sum(line.startswith("+") for line in str(diff).splitlines())
    console = Console(record=True, width=200, force_terminal=True, file=io.StringIO())
    console.print(diff)
    assert "\x1b[32m+%" in console.export_text(styles=True)


def test_brackets_of_a_rule_are_no_markup() -> None:
    assert str(gp.plan(t5(), "q[cross]:lora")).startswith("T5ForConditionalGeneration: q[cross]:lora\n")


def test_views_as_plain_values() -> None:
    model = gp.apply(llama(), "qv:lora; down:blora")
    plan = json.loads(json.dumps(gp.plan(llama(), "qv:lora").as_dict()))
    assert [site["role"] for site in plan["sites"]] == ["q", "v", "q", "v"]
    assert plan["by_rule"] == [{"rule": "qv:lora", "matched": 4, "skipped": 0, "rejected": 0, "notes": []}]
    (adapter,) = json.loads(json.dumps(gp.explain(model).as_dict()))["adapters"]
    assert [site["now"]["kept"] for site in adapter["sites"] if site["site"]["role"] == "down"] == [8, 8]
    assert len(json.loads(json.dumps(gp.sites(model).as_dict()))["sites"]) == len(gp.sites(model))


def test_plan_counts_what_apply_then_trains() -> None:
    for rules in ("qv:rlora", "linear:lora(r=3)", "q[cross]:lora; mlp:rlora(r=16)"):
        model = t5(num_layers=1)
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
    assert "task (inactive)" in str(gp.explain(model))


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
