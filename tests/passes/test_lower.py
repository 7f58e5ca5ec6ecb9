"""Any adapter with a bottleneck becomes plain LoRA with the same outputs, in memory and through files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checks import Snapshot, build, call, delta, outputs, randomize, same, sampled

import graphpeft as gp
from graphpeft.errors import AdapterError
from graphpeft.rewrite.state import chains, get_state

RANKS = {
    "rlora(r=16)": 16,
    "melora(n=4, r=2)": 8,
    "vera(r=16)": 16,
    "olora(r=4)": 8,
    "pissa(r=4)": 8,
    "blora(r=4)": 4,
}
"""Method and the rank of its plain LoRA."""


CASES = [(name, method) for name in ("llama", "gpt2") for method in RANKS]  # gpt2: a fused, transposed weight
LIKE = [("gpt2", method) for method in RANKS if not method.startswith(("rlora", "melora"))]


@pytest.mark.parametrize("case", sampled(CASES, *LIKE), ids="-".join)
def test_outputs_stay_and_the_rank_is_predicted(case: tuple[str, str], tmp_path: Path) -> None:
    name, method = case
    model = build(name)
    example, before = call(name, model), Snapshot.of(model)
    base = outputs(model, example)
    gp.apply(model, f"qv:{method}")
    randomize(model, std=0.2)
    model.eval()
    adapted = outputs(model, example)
    assert delta(adapted, base) > 1e-2
    gp.lower(model)
    # float32, two short sums more per product on outputs of size about 1.
    assert delta(outputs(model, example), adapted) < 1e-4
    entries = get_state(model).adapters["default"].entries
    assert {str(e.method) for e in entries} <= {f"lora(r={RANKS[method]})", "lora"}
    lowered = outputs(model, example)
    gp.save(model, tmp_path)
    again = gp.load(build(name), tmp_path)
    assert same(outputs(again.eval(), example), lowered)
    gp.merge(model)
    assert delta(outputs(model, example), adapted) < 1e-4
    gp.unmerge(model)
    assert same(outputs(model, example), lowered)
    gp.remove(model)
    before.check(model)


def test_the_lowered_adapter_trains() -> None:
    model = gp.lower(gp.apply(build("llama"), "qv:rlora(r=8)"))
    assert gp.trainable(model)[0] == sum(p.numel() for c in chains(model, "default").values() for p in c.parameters())
    gp.verify(model)


def test_refusals_leave_the_adapter_alone() -> None:
    model = build("llama")
    with pytest.raises(AdapterError, match="has no adapters"):
        gp.lower(model)
    gp.apply(model, "qv:rlora(r=8)")
    randomize(model)
    gp.merge(model)
    with pytest.raises(AdapterError, match=r"Cannot lower while default is merged.*unmerge"):
        gp.lower(model)
    gp.unmerge(model)
    with torch.device("meta"):
        empty = type(model)(model.config)
    gp.apply(empty, "qv:rlora(r=8)")
    with pytest.raises(AdapterError, match=r"has no values at .*q_proj.*meta device"):
        gp.lower(empty)
