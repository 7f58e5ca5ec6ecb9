"""The measures and checks behind an export's verification, tried on defects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from exports import CLOSE, SAMPLE, deployed, ids, tiny

from graphpeft.errors import ExportError
from graphpeft.exporting import parity
from graphpeft.exporting.cases import Case, Outputs, cases
from graphpeft.exporting.flat import Flat
from graphpeft.exporting.graph_export import GraphExport
from graphpeft.exporting.traceable import as_pairs
from graphpeft.runtime.session import Session


def test_cases_vary_every_size_and_pad() -> None:
    sample = ids(2, 7)
    made = cases(sample, Flat.of(tiny("bert"), sample).axes)
    assert [case.label for case in made] == ["batch 2, sequence 7", "batch 1, sequence 5", "batch 3, sequence 9"]
    assert made[-1].inputs["attention_mask"].sum() == 3 * 9 - 1
    assert made[0].inputs["attention_mask"].all()


def test_cases_of_a_decoder_hold_a_prompt_a_single_token_and_padding_on_the_left() -> None:
    flat = Flat.of(tiny("llama"), ids(2, 7), cached=True)
    sample, *made = cases(flat.inputs, flat.axes)
    assert sample.inputs["attention_mask"].all()
    sizes = []
    for case in made:
        mask, past = case.inputs["attention_mask"], case.inputs["past_key_values.0.key"].shape[2]
        assert mask.shape[1] == past + case.inputs["input_ids"].shape[1]
        assert mask[:, 1:].all()
        assert mask[-1, 0] == (len(mask) == 1)
        sizes.append((past, case.inputs["input_ids"].shape[1]))
    assert (0, 7) in sizes
    assert any(past > 0 and length == 1 for past, length in sizes)


def test_distance_sees_shapes_and_nans_and_scales_by_large_values() -> None:
    assert parity.distance({"y": np.array([1.5, np.nan])}, {"y": np.array([1.0, np.nan])}) == (0.5, "y")
    assert parity.distance({"y": np.array([101.0])}, {"y": np.array([100.0])}) == (0.01, "y")
    assert parity.distance({"y": np.array([np.nan])}, {"y": np.array([1.0])}) == (np.inf, "y")
    assert parity.distance({"y": np.zeros((2, 1))}, {"y": np.zeros(2)}) == (np.inf, "y (shape (2, 1) instead of (2,))")


def test_a_slot_that_does_nothing_is_named() -> None:
    model, session = deployed().model, Session(deployed().folder)
    slots = session.graphs["model"].slots
    with as_pairs(model, ("a", "b")) as opened, torch.no_grad():
        part = GraphExport("model", Flat.of(model, SAMPLE), deployed().folder, 1e-4, slots)
        part.check_slots(parity.Runner(session, "model"), opened.fed)
        (check,) = part.checks
        assert check.subject == "3 sites, one at a time"
        assert check.value < CLOSE
        assert part.notes == []
        for limit in (1e-4, 1e4):  # the second: however small the effect is beside the tolerance
            part.limit = limit
            for site in ("wv", "out"):
                with pytest.raises(ExportError, match=f"{site}: filling this slot alone moves the output by"):
                    part.check_slots(Deaf(session, "model", f"{site}.lora_B.weight"), opened.fed)


@dataclass(frozen=True)
class Deaf(parity.Runner):
    """A graph with a slot that does nothing, as where a pass fused it away."""

    name: str

    def run(self, case: Case, extra: Mapping[str, np.ndarray] | None = None) -> Outputs:
        return super().run(case, {name: value * (name != self.name) for name, value in (extra or {}).items()})


def test_an_adapter_that_cannot_be_told_from_none_is_refused() -> None:
    runner, sample = parity.Runner(Session(deployed().folder), "model"), [Case("batch 2", SAMPLE)]
    base, own = ([{"output": deployed().want[name]}] for name in (None, "a"))
    check = parity.check_effect(runner, parity.ReferenceRun("a", "adapter 'a'", own), base, sample)
    assert check.least
    assert check.value > 0.1  # what random adapters move
    with pytest.raises(ExportError, match="'a': it moves PyTorch's output by 0,"):
        parity.check_effect(runner, parity.ReferenceRun("a", "adapter 'a'", base), base, sample)


def test_a_swap_that_leaves_the_adapter_before_is_found() -> None:
    sample = [Case("batch 2", SAMPLE)]
    steps = [
        parity.ReferenceRun(name, f"adapter {name!r}", [{"output": deployed().want[name]}]) for name in ("a", None, "b")
    ]
    assert parity.check_swaps(parity.Runner(Session(deployed().folder), "model"), steps, sample, 1e-4).value < CLOSE

    class Sticky(parity.Runner):
        def use(self, adapters: str | None) -> None:  # type: ignore[override]
            if adapters is not None:
                super().use(adapters)

    with pytest.raises(ExportError, match=r"adapter None .swap., batch 2: output 'output' .* differs"):
        parity.check_swaps(Sticky(Session(deployed().folder), "model"), steps, sample, 1e-4)
