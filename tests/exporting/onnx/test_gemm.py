"""Sums with a slot's product as one Gemm: fewer nodes, the same numbers, and no rewrite where a sum broadcasts."""

from __future__ import annotations

from collections import Counter
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from checks import randomize
from exports import CLOSE, SAMPLE, deployed, hand, off, serving, silent

import graphpeft as gp
from graphpeft.errors import ExportError
from graphpeft.exporting import onnx
from graphpeft.passes.export import export
from graphpeft.runtime.layout import Slot
from graphpeft.runtime.session import Session


def kinds(folder: Path) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(folder / "model.onnx").graph)


def test_every_sum_of_a_gated_mlp_and_attention_is_a_gemm() -> None:
    """Of q, k and v nothing is made a tensor of three axes again, for what follows reshapes them; gate times up is a matrix."""
    found = kinds(serving("llama").folder)
    slots = Session(serving("llama").folder).graphs["model"].slots
    assert found["Gemm"] == sum(len(slot.sites) for slot in slots)
    assert found["Flatten"] == 2  # what attention and what the MLP reads
    base = ir.load(serving("llama").folder / "model.onnx").graph
    assert not [node for node in base if not any(v.uses() or v.is_graph_output() for v in node.outputs)]


def test_numbers_are_those_of_a_product_and_a_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("graphpeft.exporting.onnx.pipeline"), "fuse_sums", lambda model, slots: None)
    export(deployed().model, tmp_path / "plain", inputs=SAMPLE, share=True, verify="off")
    assert kinds(tmp_path / "plain")["Gemm"] == 0
    plain, fused = Session(tmp_path / "plain"), Session(deployed().folder)
    for name in (None, "a", "b"):
        plain.use(name)
        fused.use(name)
        x = {"x": SAMPLE["x"].numpy()}
        assert off(plain.run(x)["output"], fused.run(x)["output"]) < CLOSE


def test_a_sum_that_broadcasts_stays(tmp_path: Path) -> None:
    """y (1, 2, 4) + h @ B (3, 2, 4): as a Gemm, y would have too few rows."""
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        graph (float[3,2,5] x, float[1,2,4] y, float[5,r] "s.lora_A.weight", float[r,4] "s.lora_B.weight") => (float[3,2,4] z)
        { h = MatMul(x, "s.lora_A.weight")
          d = MatMul(h, "s.lora_B.weight")
          z = Add(y, d) }
    """.replace('"s.lora_A.weight"', "A").replace('"s.lora_B.weight"', "B")  # the parser takes no dots
    import onnx as onnx_package

    model = ir.from_proto(onnx_package.parser.parse_model(text))
    for value in model.graph.inputs[2:]:
        value.name = f"s.lora_{value.name}.weight"
    for node, last in zip(model.graph, ("r", 4, 4), strict=True):
        node.outputs[0].shape = ir.Shape((3, 2, last))
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    onnx.fuse_sums(model, [Slot(5, (("s", 4),), "r")])
    assert [node.op_type for node in model.graph] == ["MatMul", "MatMul", "Add"]
    random = np.random.default_rng(0)
    fed = {"x": random.standard_normal((3, 2, 5)), "y": random.standard_normal((1, 2, 4)),
           "s.lora_A.weight": random.standard_normal((5, 2)), "s.lora_B.weight": random.standard_normal((2, 4))}  # fmt: skip
    fed = {name: value.astype(np.float32) for name, value in fed.items()}
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), silent())
    want = fed["y"] + fed["x"] @ fed["s.lora_A.weight"] @ fed["s.lora_B.weight"]
    assert off(session.run(None, fed)[0], want) < CLOSE


def test_quantized_and_gated_graphs_keep_their_gemms(tmp_path: Path) -> None:
    export(hand(), tmp_path / "x", inputs=SAMPLE, per_row=True, quantize="int4", verify="fast")
    assert kinds(tmp_path / "x")["Gemm"] == 2


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError()])
def test_the_error_of_a_pass_is_that_of_the_export(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: ir.Model, slots: object) -> None:
        raise error

    monkeypatch.setattr(import_module("graphpeft.exporting.onnx.pipeline"), "fuse_sums", fail)
    wanted = (ExportError, "Usually the disk is full") if isinstance(error, OSError) else (MemoryError, "")
    with pytest.raises(wanted[0], match=wanted[1]):
        export(deployed().model, tmp_path / "out", inputs=SAMPLE, verify="off")
    assert not list(tmp_path.iterdir())


def test_a_projection_that_ends_the_model_says_its_shape(tmp_path: Path) -> None:
    """The sum of a slot is then the graph's output, whose shape onnx.checker asks for."""
    x = torch.randn(3, 4)
    model = gp.apply(torch.nn.Sequential(torch.nn.Linear(4, 5)), "head:lora(r=2)", inputs=(x,))
    randomize(model)
    gp.export(model, tmp_path / "out", inputs=(x,))
    session = Session(tmp_path / "out")
    session.use("default")
    (found,) = session.run({"input": x.numpy()}).values()
    assert off(found, model(x).detach().numpy()) < CLOSE
