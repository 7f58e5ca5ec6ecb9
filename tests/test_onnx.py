"""The ONNX side of the export: the slot census on damaged graphs, and what cannot be translated."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
import torch
import zoo
from exports import SAMPLE, deployed

from graphpeft import onnx
from graphpeft.errors import ExportError
from graphpeft.flat import Flat
from graphpeft.slots import Slot


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda g, a: g.inputs.remove(a), "wq: .* the input wq.lora_A.weight is gone"),
        (lambda g, a: g.inputs.append(a), "lists an input twice"),
        (lambda g, a: setattr(a, "shape", ir.Shape((32, "rank_1"))), "wq: .* has shape"),
        (lambda g, a: reader(a).replace_input_with(1, g.inputs[-1]), "wq: .* nothing reads wq.lora_A.weight"),
        (lambda g, a: setattr(reader(a), "op_type", "Gemm"), "wq: .* goes into Gemm instead of MatMul"),
        (lambda g, a: setattr(reader(a).outputs[0], "shape", ir.Shape(("batch", 5, 2))), "wq: .* a fixed rank"),
    ],
    ids=["dropped", "doubled", "shared rank", "unread", "fused", "stale rank"],
)
def test_census_finds_damaged_slots(damage: Any, message: str) -> None:
    model = ir.load(deployed().folder / "model.onnx")
    slots = [Slot(site, 32, 32, f"rank_{i}") for i, site in enumerate(("wq", "wv"))]
    onnx.census(model, slots)
    damage(model.graph, next(value for value in model.graph.inputs if value.name == "wq.lora_A.weight"))
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
        onnx.translate(flat.module(), flat.inputs, flat.outputs, [flat.axes["x"]], None)
