"""The measures and checks behind an export's verification, tried on defects."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from exports import CLOSE, SAMPLE, deployed, ids, tiny

from graphpeft import parity
from graphpeft.errors import ExportError
from graphpeft.flat import Flat
from graphpeft.runtime import Session
from graphpeft.slots import Slot, SlotBranch, inserted
from graphpeft.state import chains


def test_cases_vary_every_size_and_pad() -> None:
    sample = ids(2, 7)
    cases = parity.cases(sample, Flat.of(tiny("bert"), sample).axes)
    assert [case.label for case in cases] == ["batch 2, sequence 7", "batch 1, sequence 5", "batch 3, sequence 9"]
    assert cases[-1].inputs["attention_mask"].sum() == 3 * 9 - 1
    assert cases[0].inputs["attention_mask"].all()


def test_distance_sees_shapes_and_nans_and_scales_by_large_values() -> None:
    assert parity.distance({"y": np.array([1.5, np.nan])}, {"y": np.array([1.0, np.nan])}) == (0.5, "y")
    assert parity.distance({"y": np.array([101.0])}, {"y": np.array([100.0])}) == (0.01, "y")
    assert parity.distance({"y": np.array([np.nan])}, {"y": np.array([1.0])}) == (np.inf, "y")
    assert parity.distance({"y": np.zeros((2, 1))}, {"y": np.zeros(2)}) == (np.inf, "y (shape (2, 1) instead of (2,))")


def test_a_slot_that_does_nothing_is_named() -> None:
    model, session = deployed().model, Session(deployed().folder)
    flat = Flat.of(model, SAMPLE)
    slots = [Slot.at(site, f"rank_{i}") for i, site in enumerate(chains(model, "a"))]
    assert [slot.site for slot in slots] == ["wq", "wv"]
    like = {name: torch.zeros(1) for slot in slots for name in (slot.a, slot.b)}
    branches = {site: SlotBranch(slot, SAMPLE["x"]) for site, slot in zip(chains(model, "a"), slots, strict=True)}

    with inserted(model, branches):
        module = flat.module([f"adapters.0.{site.weight}_slot.{side}" for site in branches for side in "AB"])

        def reference(inputs: parity.Tensors, fed: parity.Tensors) -> parity.Outputs:
            with torch.no_grad():
                found = module(*inputs.values(), *(fed[name] for slot in slots for name in (slot.a, slot.b)))
            return {"output": found[0].numpy()}

        case = parity.Case("batch 2", SAMPLE)
        check, unmoved = parity.check_slots(session, reference, slots, case, like, 1e-4)
        assert check.value < CLOSE
        assert unmoved == []
        for limit in (1e-4, 1e4):  # the second: however small the effect is beside the tolerance
            with pytest.raises(ExportError, match="wv: a pair fed to this slot alone moves the output by"):
                parity.check_slots(deaf(session, "wv."), reference, slots, case, like, limit)


def deaf(session: Session, prefix: str) -> Any:
    """A session that ignores some inputs, as ONNX Runtime does where a pass fused a slot away."""

    def run(names: list[str], fed: dict[str, np.ndarray]) -> list[np.ndarray]:
        return session.inference.run(names, {n: v for n, v in fed.items() if not n.startswith(prefix)})

    return SimpleNamespace(inference=SimpleNamespace(run=run))
