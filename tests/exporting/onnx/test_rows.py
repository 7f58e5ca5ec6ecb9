"""A batch whose rows have adapters of their own."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
import torch
from checks import randomize
from exports import (
    CLOSE,
    FAR,
    HAND,
    SAMPLE,
    adapted,
    arrays,
    dense,
    deployed,
    hand,
    ids,
    off,
    running,
    serving,
    silent,
    tiny,
)

import graphpeft as gp
from graphpeft.errors import AdapterError, ExportError
from graphpeft.exporting import parity
from graphpeft.exporting.cases import Case
from graphpeft.passes.export import export
from graphpeft.runtime.layout import ROW_WEIGHTS
from graphpeft.runtime.session import Session, Use

X = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(8))
HALF = {"a": 0.5, "b": 0.5}
MIXED: list[str | dict[str, float] | None] = ["a", None, "b", HALF]
SUMMED = 2 * CLOSE
"""Two adapters stand side by side: sums of twice as many terms."""


@cache
def gated() -> SimpleNamespace:
    """The model and adapters of `deployed()`, with gates for rows."""
    model = adapted("hand", *HAND, inputs=SAMPLE)
    home = tempfile.TemporaryDirectory()  # deleted when the tests are over
    report = export(model, Path(home.name) / "deploy", inputs=SAMPLE, per_row=True, share=True, verify="fast")
    return SimpleNamespace(home=home, model=model, folder=Path(home.name) / "deploy", report=report)


def answer(session: Session, use: Use, x: torch.Tensor = X) -> np.ndarray:
    session.use(use)
    return session.run({"x": x.numpy()})["output"]


def test_every_row_gets_its_adapter_its_blend_or_none() -> None:
    session = Session(gated().folder)
    got = answer(session, MIXED)
    for row, use in enumerate(MIXED):
        if not isinstance(use, dict):
            assert off(got[row], running(gated().model, use, {"x": X})[row]) < SUMMED
        assert off(got[row], answer(session, use)[row]) < SUMMED
    assert off(got[3], dense(HALF, X)[3]) < SUMMED
    assert min(off(got[3], dense(use, X)[3]) for use in ({}, {"a": 1.0}, {"b": 1.0})) > FAR


@pytest.mark.parametrize(
    "rows", [["b"], [None] * 4, ["a"] * 4, ["b", "a"], [{"a": -0.5}, {"b": 2.0, "a": 1.0}, {}]], ids=str
)
def test_rows_of_any_number_and_order(rows: Sequence[Use]) -> None:
    session, x = Session(gated().folder), X[: len(rows)]
    got = answer(session, rows, x)
    for row, use in enumerate(rows):
        mix = {use: 1.0} if isinstance(use, str) else use or {}
        assert off(got[row], dense(mix, x)[row]) < SUMMED


def test_without_rows_the_graph_serves_one_adapter_for_all() -> None:
    session = Session(gated().folder)
    for use in (None, "a", MIXED, "b", None):
        got = answer(session, use)
        if use is not MIXED:
            assert off(got, running(gated().model, use, {"x": X})) < CLOSE


def test_rows_of_activations_without_an_axis_for_the_batch() -> None:
    """GPT-2 folds batch and positions into one axis before every projection."""
    served, inputs = serving("gpt2"), ids(4, 7, left=2)
    session = Session(served.folder)
    session.use(MIXED)
    got = session.run(arrays(inputs))["logits"]
    for row, use in enumerate(MIXED):
        if isinstance(use, dict):
            session.use(use)
            want = session.run(arrays(inputs))["logits"]
        else:
            want = running(served.model, use, inputs)
        # Relative to logits up to 10; the first two positions are padding, which no mask lets see anything.
        assert parity.distance({"logits": got[row][2:]}, {"logits": want[row][2:]})[0] < SUMMED
        others = [running(served.model, other, inputs)[row] for other in (None, "a", "b") if other != use]
        assert min(off(got[row], other) for other in others) > FAR


def test_rows_generate_as_each_would_alone() -> None:
    session, inputs = Session(serving("gpt2").folder), arrays(ids(4, 7, left=2))
    session.use(MIXED)
    got = session.generate(inputs, 10, stop=[])
    for row, use in enumerate(MIXED):
        session.use(use)
        assert np.array_equal(session.generate(inputs, 10, stop=[])[row], got[row])
    assert len({tuple(tokens) for tokens in got[:, 7:]}) == 4


def test_a_batch_of_another_size_is_refused() -> None:
    session = Session(gated().folder)
    session.use(MIXED)
    with pytest.raises(AdapterError, match="given 4 rows, but the batch has 3"):
        session.run({"x": X[:3].numpy()})
    session = Session(serving("gpt2").folder)
    session.use(["a", "b"])
    with pytest.raises(AdapterError, match="given 2 rows, but the batch has 3"):
        session.generate(arrays(ids(3, 7)), 2)


def test_a_graph_without_gates_refuses_rows_and_runs_on() -> None:
    session = Session(deployed().folder)
    session.use("a")
    with pytest.raises(AdapterError, match=r"one adapter for all rows.*per_row=True"):
        session.use(["a", None])
    assert session.active == "a"
    assert off(session.run({"x": SAMPLE["x"].numpy()})["output"], deployed().want["a"]) < CLOSE


def test_plain_onnxruntime_runs_a_bank_of_adapters(tmp_path: Path) -> None:
    session = Session(gated().folder)
    session.write_bank(tmp_path / "both.onnx_adapter", ["b", "a"])
    adapter = ort.LoraAdapter()
    adapter.Load(str(tmp_path / "both.onnx_adapter"))
    run = ort.RunOptions()
    run.add_active_adapter(adapter)
    plain = ort.InferenceSession(str(gated().folder / "model.onnx"), silent())
    weights = np.array([[0, 1], [0, 0], [1, 0], [0.5, 0.5]], np.float32)
    got = plain.run(None, {"x": X.numpy(), ROW_WEIGHTS: weights}, run)[0]
    assert off(got, answer(session, MIXED)) < SUMMED
    with pytest.raises(AdapterError, match="no adapter 'c'"):
        session.write_bank(tmp_path / "more.onnx_adapter", ["a", "c"])


def test_a_graph_that_gives_all_rows_one_adapter_is_found() -> None:
    cases = [Case("batch 4", {"x": X})]
    steps = [
        parity.ReferenceRun(use, "", [{"output": running(gated().model, use, {"x": X})}]) for use in ("a", "b", None)
    ]
    runner = parity.Runner(Session(gated().folder), "model")
    assert parity.check_rows(runner, steps, cases, 1e-4).value < SUMMED

    class First(parity.Runner):
        def use(self, adapters: Use) -> None:
            super().use(adapters[0])  # type: ignore[index]

    with pytest.raises(ExportError, match=r"an adapter for each row, batch 4: output 'output' .* differs from PyTorch"):
        parity.check_rows(First(Session(gated().folder), "model"), steps, cases, 1e-4)


@pytest.mark.slow
def test_an_adapter_of_the_decoder_alone_leaves_the_encoder_without_gates(tmp_path: Path) -> None:
    model = gp.apply(tiny("t5"), "q[cross]:lora(r=2)", name="a", verify="off")
    randomize(model, "a", seed=0)
    report = export(model, tmp_path / "deploy", per_row=True, verify="full")
    assert {check.test for check in report.checks} >= {"rows", "effect"}
    session = Session(tmp_path / "deploy")
    assert [len(graph.slots) for graph in session.graphs.values()] == [0, 1]
    x = {"input_ids": np.array([[5, 6, 7]] * 2), "decoder_input_ids": np.array([[1, 2]] * 2)}
    base = session.run(x)["logits"]
    session.use(["a", None])
    found = session.run(x)["logits"]
    assert off(found[1], base[1]) < CLOSE * np.abs(base).max()
    assert off(found[0], base[0]) > FAR


def test_the_former_name_of_the_option_works(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match="per_row"):
        report = export(hand(), tmp_path / "deploy", inputs=SAMPLE, rows=True, verify="off")
    assert "rows" in report.passes
