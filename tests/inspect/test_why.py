"""Why is there no adapter on this layer? Every answer a user may need, held against what `plan` does."""

from __future__ import annotations

import json

import pytest
from torch import nn
from zoo import clip, gpt2, llama, t5

import graphpeft as gp
from graphpeft.capturing.skeleton import skeleton
from graphpeft.errors import MatchError


def test_a_role_that_no_rule_names() -> None:
    (reason,) = gp.why(llama(), "model.layers.1.mlp.up_proj", "qv:lora(r=2)").reasons
    assert reason.role == "up"
    assert reason.because == ("`qv:lora(r=2)` is not for it: it asks for q, v",)
    assert reason.place.startswith("modeling_llama.py:")
    assert "self.up_proj(x)" in reason.place
    assert reason.remedy == "up:lora(r=2)"
    assert reason.weight == "model.layers.1.mlp.up_proj.weight"
    (entry,) = [e for e in gp.plan(llama(), reason.remedy).entries if e.site.layer == 1]
    assert entry.site.weight == reason.weight


def test_a_layer_that_the_qualifiers_leave_out_and_one_that_they_take() -> None:
    taken, left = gp.why(llama(layers=4), "*.q_proj", "qv[layers=0-1]:lora").reasons
    assert (taken.layers, left.layers) == ((0, 1), (2, 3))
    assert taken.because == ("`qv[layers=0-1]:lora` takes it",)
    assert left.because == ("`qv[layers=0-1]:lora` leaves it out: its layer is outside 0-1",)
    assert (taken.remedy, left.remedy) == ("", "qv:lora")


def test_an_adapted_model_answers_by_its_own_rules() -> None:
    model = gp.apply(t5(), "q[cross]:lora", name="task")
    reasons = gp.why(model, "*.q").reasons
    assert [(r.weight, r.adapters) for r in reasons if r.adapters] == [
        ("decoder.block.*.layer.1.EncDecAttention.q.weight", ("task",))
    ]
    assert {r.because for r in reasons if not r.adapters} == {("`q[cross]:lora` leaves it out: not cross-attention",)}


def test_rows_of_a_fused_weight() -> None:
    reasons = gp.why(gpt2(), "*.c_attn", "v:lora").reasons
    assert [r.role for r in reasons] == ["q, rows 0:64", "k, rows 64:128", "v, rows 128:192"]
    assert [r.because[0].endswith("takes it") for r in reasons] == [False, False, True]


def test_a_projection_without_a_role_says_how_near_a_pattern_came() -> None:
    why = gp.why(skeleton("mamba"), "*.x_proj", "qv:lora")
    assert "no attention core was found" in str(why)
    assert "nearest miss at modeling_mamba.py:" in str(why)
    (reason,) = why.reasons
    assert len(gp.plan(skeleton("mamba"), reason.remedy)) == len(reason.layers)


def test_what_is_no_projection_and_what_no_call_runs() -> None:
    (positions,) = gp.why(gpt2(), "transformer.wpe", "qv:lora").reasons
    assert positions.because == (
        "the graph uses it in `embedding`, where it multiplies no activation and no token picks its rows",
    )

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):  # type: ignore[no-untyped-def]
            return self.used(x)

    import torch

    (idle,) = gp.why(Idle(), "idle", "path(*):lora", inputs=torch.randn(3, 4)).reasons
    assert idle.because == ("no example call runs it; give one with inputs=",)


def test_a_part_that_is_captured_by_itself() -> None:
    (reason,) = gp.why(clip(), "vision_model.encoder.layers.0.self_attn.q_proj", "q:lora").reasons
    assert reason.because == ("`q:lora` takes it",)


def test_a_name_that_means_nothing() -> None:
    with pytest.raises(MatchError, match=r"has no weight matrix 'model\.layers\.0\.mlp\.up'.*Near it: .*up_proj"):
        gp.why(llama(), "model.layers.0.mlp.up", "q:lora")
    assert json.loads(json.dumps(gp.why(llama(), "lm_head", "q:lora").as_dict()))["reasons"][0]["role"] == "head"
