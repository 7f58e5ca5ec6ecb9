"""Quantized graphs: slots stay alive, adapters act as in float, and a wrong weight is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from exports import FAR, SAMPLE, hand, off

from graphpeft.errors import ExportError
from graphpeft.exporting import onnx
from graphpeft.exporting.onnx.quantize import quantize, rounded
from graphpeft.passes.export import export
from graphpeft.runtime.session import Session


def answers(session: Session) -> dict[str | None, np.ndarray]:
    found = {}
    for name in (None, *session.adapters):
        session.use(name)
        found[name] = session.run({"x": SAMPLE["x"].numpy()})["output"]
    return found


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantize") / "float"
    export(hand("qv:lora(r=2)", "qkv:lora(r=3)"), folder, inputs=SAMPLE, verify="off")
    return folder


@pytest.mark.parametrize(("bits", "limit"), [("int4", 0.3), ("int8", 0.03)])
def test_adapters_do_the_same_on_a_quantized_base(bits: onnx.Bits, limit: float, floats: Path, tmp_path: Path) -> None:
    report = export(hand("qv:lora(r=2)", "qkv:lora(r=3)"), tmp_path / "x", inputs=SAMPLE, quantize=bits)
    assert {check.subject for check in report.checks if check.test == "quantized"} >= {"adapter 'a'", "adapter 'b'"}
    got, want = answers(Session(tmp_path / "x")), answers(Session(floats))
    kinds = {node.op_type for node in ir.load(tmp_path / "x" / "model.onnx").graph}
    assert {"int4": "MatMulNBits", "int8": "MatMulInteger"}[bits] in kinds
    for name in want:
        # Steps of 1/15 or 1/255 of a block's or a tensor's range; far less than what the adapters do.
        assert 0 < off(got[name], want[name]) < limit
    assert min(off(got[name], got[None]) for name in "ab") > max(FAR, limit)


def test_a_wrong_weight_shows_in_the_comparison(floats: Path) -> None:
    graph = ir.load(floats / "model.onnx")
    quantized = quantize(graph, Session(floats).graphs["model"].slots, "int4")
    reference = rounded(graph, quantized)
    node = next(node for node in quantized.graph if node.op_type == "MatMulNBits")
    value = node.inputs[2]
    assert value is not None
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * 1.1, name=value.name)

    def run(model: ir.Model) -> np.ndarray:
        import onnxruntime as ort
        from exports import silent

        session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), silent())
        return session.run(["output"], {"x": SAMPLE["x"].numpy()})[0]

    assert off(run(quantized), run(reference)) > 1e-3


def test_without_a_constant_matrix_there_is_nothing_to_quantize(floats: Path) -> None:
    graph = ir.load(floats / "model.onnx")
    for node in graph.graph:
        if node.op_type == "MatMul":
            node.op_type = "Mul"
    with pytest.raises(ExportError, match=r"no product with a constant matrix|goes into Mul"):
        quantize(graph, Session(floats).graphs["model"].slots, "int4")


def test_other_widths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match='"int4", "int8" or None'):
        export(hand(), tmp_path / "x", inputs=SAMPLE, quantize="int2")  # type: ignore[arg-type]
