"""The ONNX side of the export: the slot census on damaged graphs, and what cannot be translated."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
import zoo
from exports import SAMPLE, deployed

import graphpeft as gp
from graphpeft.errors import ExportError
from graphpeft.exporting import onnx
from graphpeft.exporting.flat import Flat
from graphpeft.runtime.session import Session


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda g, a, b: g.inputs.remove(a), r"the input wq\+wv.lora_A.weight is gone"),
        (lambda g, a, b: g.inputs.remove(b), "the input wv.lora_B.weight is gone"),
        (lambda g, a, b: g.inputs.append(a), "lists an input twice"),
        (lambda g, a, b: setattr(a, "shape", g.inputs[-2].shape), r"wq\+wv: .* has shape"),
        (
            lambda g, a, b: setattr(b, "shape", ir.Shape((2, 32))),
            r"wq\+wv: .* the input wv.lora_B.weight has shape \[2,32\]",
        ),
        (
            lambda g, a, b: reader(a).replace_input_with(1, g.inputs[-2]),
            r"wq\+wv: .* nothing reads wq\+wv.lora_A.weight",
        ),
        (lambda g, a, b: reader(b).replace_input_with(1, g.inputs[-1]), r"wq\+wv: .* nothing reads wv.lora_B.weight"),
        (lambda g, a, b: setattr(reader(a), "op_type", "Gemm"), r"wq\+wv: .* goes into Gemm instead of MatMul"),
        (lambda g, a, b: setattr(reader(b), "op_type", "Mul"), r"wq\+wv: .* wv.lora_B.weight goes into Mul"),
        (lambda g, a, b: setattr(reader(a).outputs[0], "shape", ir.Shape(("batch", 5, 2))), r"wq\+wv: .* a fixed rank"),
    ],
    ids=[
        "no A",
        "no B",
        "doubled",
        "other rank",
        "B's rank",
        "A unread",
        "B unread",
        "A fused",
        "B fused",
        "stale rank",
    ],
)
def test_census_finds_damaged_slots(damage: Any, message: str) -> None:
    model = ir.load(deployed().folder / "model.onnx")
    slots = Session(deployed().folder).graphs["model"].slots
    assert [slot.sites for slot in slots] == [("wq", "wv"), ("out",)]
    onnx.census(model, slots)
    inputs = {value.name: value for value in model.graph.inputs}
    damage(model.graph, inputs["wq+wv.lora_A.weight"], inputs["wv.lora_B.weight"])
    with pytest.raises(ExportError, match=message):
        onnx.census(model, slots)


def reader(value: ir.Value) -> ir.Node:
    return next(iter(value.uses())).node


def test_a_model_that_torch_cannot_translate_is_explained() -> None:
    class Deciding(zoo.HandWritten):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if torch.compiler.is_compiling() is False or x.sum() > 0 else x

    flat = Flat.of(Deciding().eval(), SAMPLE)
    with pytest.raises(ExportError, match=r"torch.onnx cannot translate the model: .*[Dd]ata-dependent"):
        onnx.translate(flat.module(), flat.inputs, flat.outputs, [flat.axes["x"]])


def test_a_pass_of_the_pipeline_that_eats_a_slot_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The census is what each pass ensures, whatever the pass itself says."""

    def eat(model: ir.Model, slots: object) -> None:
        product = reader(next(value for value in model.graph.inputs if value.name == "out.lora_B.weight"))
        product.replace_input_with(1, next(value for value in model.graph.inputs if value.name == "wv.lora_B.weight"))

    monkeypatch.setattr(import_module("graphpeft.exporting.onnx.pipeline"), "fuse_sums", eat)
    with pytest.raises(ExportError, match=r"out: the adapter slot did not survive .*nothing reads out\.lora_B"):
        gp.export(deployed().model, tmp_path / "out", inputs=SAMPLE, verify="off")
