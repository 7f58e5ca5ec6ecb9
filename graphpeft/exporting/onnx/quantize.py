"""Quantize base weights to 4 or 8 bits with onnxruntime's quantizers. Adapters stay float and read unrounded activations.

Both quantizers treat an optional input as a weight and fold it, so slots are required inputs while they run.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir

from graphpeft.errors import ExportError
from graphpeft.exporting.onnx.census import attach, census
from graphpeft.runtime.layout import AdapterInput
from graphpeft.tracing import as_pass

Bits = Literal["int4", "int8"]
BLOCK = 32
"""How many inputs share a scale in 4 bits."""
ROUNDED = 4
"""ONNX Runtime's accuracy level for 4-bit weights times 8-bit activations; 0 does not round activations."""


@as_pass("quantize", "quantize base weights to 4 or 8 bits")
def quantize(model: ir.Model, slots: Sequence[AdapterInput], bits: Bits, accuracy_level: int = ROUNDED) -> ir.Model:
    """The graph with its constant matrices in `int4` (`MatMulNBits`) or `int8` (with dynamically quantized activations).

    For 4-bit products, `accuracy_level=4` lets ONNX Runtime round activations to 8-bit integers per block.

    Raises:
        ExportError: a slot did not survive, or there was nothing to quantize.
    """
    ir.external_data.load_to_model(model)
    defaults = _closed(model)
    slotted = (node for node in model.graph if any(value in model.graph.inputs for value in node.inputs))
    exclude = [node.name for node in slotted if node.name]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        proto = ir.to_proto(model)
        made = _int4(proto, exclude, accuracy_level) if bits == "int4" else _int8(proto, exclude, Path(folder))
    graph = ir.from_proto(made)
    _reopened(model, defaults)
    census(graph, slots)
    if not any(node.op_type in {"MatMulNBits", "MatMulInteger"} for node in graph.graph):
        raise ExportError(f"quantize={bits!r}: the graph has no product with a constant matrix. Leave quantize out.")
    _reopened(graph, defaults)
    return graph


def rounded(model: ir.Model, quantized: ir.Model) -> ir.Model:
    """`model` in float with the rounded weights of `quantized`: the reference for checking the quantized graph."""
    made = ir.from_proto(ir.to_proto(model))
    products = {node.outputs[0].name: node for node in made.graph if node.op_type == "MatMul"}
    for output, weight in _weights(quantized):
        if (product := products.get(output)) is not None:
            name = f"{output}.rounded"
            tensor = ir.tensor(weight, name=name)
            value = ir.Value(
                name=name, const_value=tensor, shape=ir.Shape(weight.shape), type=ir.TensorType(tensor.dtype)
            )
            made.graph.register_initializer(value)
            product.replace_input_with(1, value)
    return made


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the quantizers' message for every node, and undo the changes that importing them makes to the root logger."""
    root, before = logging.root, logging.root.manager.disable
    handlers, level = list(root.handlers), root.level
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
        root.handlers[:] = handlers
        root.setLevel(level)


def _int4(proto: onnx.ModelProto, exclude: list[str], accuracy_level: int) -> onnx.ModelProto:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        proto, block_size=BLOCK, is_symmetric=False, nodes_to_exclude=exclude, accuracy_level=accuracy_level or None
    )
    quantizer.process()
    return quantizer.model.model


def _int8(proto: onnx.ModelProto, exclude: list[str], folder: Path) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = folder / "model.onnx"
    # Unsigned weights: on CPUs without VNNI, products of unsigned and signed bytes saturate, and outputs are 20 % off.
    quantize_dynamic(
        proto, path, op_types_to_quantize=["MatMul"], nodes_to_exclude=exclude, weight_type=QuantType.QUInt8,
        per_channel=True, extra_options={"MatMulConstBOnly": True},
    )  # fmt: skip
    return onnx.load(path)


def _closed(model: ir.Model) -> dict[str, np.ndarray]:
    """Make all optional inputs required; returns their defaults."""
    found = {}
    for value in model.graph.inputs:
        if value.const_value is not None:
            found[str(value.name)] = value.const_value.numpy()
            value.const_value = None
            model.graph.initializers.pop(str(value.name))
    return found


def _reopened(model: ir.Model, defaults: dict[str, np.ndarray]) -> None:
    for value in model.graph.inputs:
        if value.name in defaults:
            attach(model, value, defaults[value.name])


def _weights(model: ir.Model) -> Iterator[tuple[str, np.ndarray]]:
    """Outputs of quantized products, and their dequantized weights (inputs, outputs)."""
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            yield str(node.outputs[0].name), _unpacked(node)
        elif node.op_type == "MatMulInteger":
            codes, point = (_array(node.inputs[i]).astype(np.float32) for i in (1, 3))
            cast = next(iter(node.outputs[0].uses())).node
            scaled = next(iter(cast.outputs[0].uses())).node
            scale = next(value for value in scaled.inputs if value is not cast.outputs[0])
            weight = next(value for value in scale.producer().inputs if value.const_value is not None)  # type: ignore[union-attr]
            yield str(scaled.outputs[0].name), ((codes - point) * _array(weight)).astype(np.float32)


def _unpacked(node: ir.Node) -> np.ndarray:
    inputs, outputs, block = (node.attributes[name].as_int() for name in ("K", "N", "block_size"))
    packed, scales, points = (_array(value) for value in node.inputs[1:4])
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(outputs, -1, block).astype(np.float32)
    zeros = np.stack([points & 15, points >> 4], -1).reshape(outputs, -1)[:, : codes.shape[1]].astype(np.float32)
    weight = (codes - zeros[..., None]) * scales.reshape(outputs, -1, 1)
    return np.ascontiguousarray(weight.reshape(outputs, -1)[:, :inputs].T.astype(scales.dtype))


def _array(value: ir.Value | None) -> np.ndarray:
    assert value is not None
    assert value.const_value is not None, "quantizers write constants"
    return value.const_value.numpy()
