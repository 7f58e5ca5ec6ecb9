"""A different adapter or blend for every row of a batch: several adapters are concatenated along the rank axis, and a
per-row gate zeroes or scales the ranks of each.

    h = (x @ A) * gate,  gate = row_weights[:, segments]  (rows, rank),  y + h @ B

The defaults are one weight of 1 and one segment 0, which broadcast over any rank, so that the gate has no effect.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphpeft.exporting.onnx.census import attach, dims, products
from graphpeft.runtime.layout import ROW_WEIGHTS, AdapterInput, pair_slots
from graphpeft.tracing import as_pass


@as_pass("rows", "gate every slot by batch row")
def gate_rows(model: ir.Model, slots: Sequence[AdapterInput], batch: str = "batch") -> tuple[AdapterInput, ...]:
    """Gate every slot's ranks by row. The batch is the first axis of the activations, or its outer part."""
    inputs = {value.name: value for value in model.graph.inputs}
    if not (pairs := pair_slots(slots)):  # all sites are in the other graph
        return tuple(slots)
    dtype = inputs[pairs[0].a].dtype
    assert dtype is not None, "a graph input has a type"
    weights = _input(model, ROW_WEIGHTS, dtype, ("rows", "adapters"), np.ones((1, 1), dtype.numpy()))
    for number, slot in enumerate(pairs):
        place = (f"units_{number}",)
        segments = _input(model, slot.segments, ir.DataType.INT64, place, np.zeros(1, np.int64))
        for product in products(slot, inputs[slot.a]):
            _gate(model.graph, product, weights, segments, batch)
    return tuple(slots)


def _gate(graph: ir.Graph, product: ir.Node, weights: ir.Value, segments: ir.Value, batch: str) -> None:
    h = product.outputs[0]
    shape, uses = dims(h), list(h.uses())
    nodes: list[ir.Node] = []

    def add(kind: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        nodes.append(ir.node(kind, list(inputs), attributes))
        return nodes[-1].outputs[0]

    gate = add("Gather", weights, segments, axis=1)
    if shape[0] == batch:
        for _ in shape[2:]:
            gate = add("Unsqueeze", gate, _ints(graph, 1))
        result = add("Mul", h, gate)
    else:  # rows and positions share an axis: split, gate, join; allowzero, because a rank of 0 is a real size here
        count, rank = add("Shape", weights, end=1), add("Shape", h, start=len(shape) - 1)
        apart = add("Concat", count, add("Div", add("Shape", h, end=1), count), rank, axis=0)
        rows = add("Mul", add("Reshape", h, apart, allowzero=1), add("Unsqueeze", gate, _ints(graph, 1)))
        result = add("Reshape", rows, add("Shape", h), allowzero=1)
    result.shape, result.type = h.shape, h.type
    graph.insert_after(product, nodes)
    for use in uses:
        use.node.replace_input_with(use.idx, result)


def _ints(graph: ir.Graph, value: int) -> ir.Value:
    """A constant with one integer."""
    name = f"graphpeft.int_{value}"
    if name not in graph.initializers:
        tensor = ir.tensor(np.array([value], np.int64), name=name)
        made = ir.Value(name=name, const_value=tensor, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
        graph.register_initializer(made)
    return graph.initializers[name]


def _input(model: ir.Model, name: str, dtype: ir.DataType, shape: Sequence[str], default: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    model.graph.inputs.append(value)
    attach(model, value, default)
    return value
