"""y + h @ B as one Gemm, which saves the sum's pass over y and its kernel launch.

A Gemm takes matrices only, so activations around a slot are flattened to matrices (positions, features) and reshaped back
afterwards, unless their only readers are reshapes anyway. `sink` then removes most of the reshapes: it moves each
one below the element-wise operators that follow, until it meets the Flatten of the next slot, and the two cancel. In a
gated MLP, all activations between the up and down projections stay matrices this way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphpeft.exporting.onnx.census import dims, products
from graphpeft.runtime.layout import AdapterInput, b_of, pair_slots
from graphpeft.tracing import as_pass

ELEMENTWISE = {"Mul", "Add", "Sub", "Sigmoid", "Tanh", "Relu", "Gelu", "Erf", "Swish", "HardSwish", "Softplus"}


@as_pass("gemm", "fuse each slot's product and sum into one Gemm")
def fuse_sums(model: ir.Model, slots: Sequence[AdapterInput]) -> tuple[AdapterInput, ...]:
    """Rewrite every sum with a slot's product, unless it broadcasts. The slots do not change."""
    work = _Flat(model.graph)
    inputs = {value.name: value for value in model.graph.inputs}
    place = {id(node): number for number, node in enumerate(model.graph)}
    found = [node for slot in pair_slots(slots) for site in slot.sites for node in products(slot, inputs[b_of(site)])]
    for product in sorted(found, key=lambda node: place[id(node)]):
        work.fuse(product)
    work.sink()
    work.clean()
    return tuple(slots)


class _Flat:
    """The activations that were flattened to matrices, each once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.matrices: dict[ir.Value, ir.Value] = {}
        self.shapes: dict[tuple[object, ...], ir.Value] = {}
        self.backs: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        """Outputs of the reshapes back: their matrix and shape."""

    def fuse(self, product: ir.Node) -> None:
        (h, b), result = product.inputs, product.outputs[0]
        uses = list(result.uses())
        if len(uses) != 1 or uses[0].node.op_type != "Add" or h is None:
            return
        add = uses[0].node
        y, total = add.inputs[1 - uses[0].idx], add.outputs[0]
        if y is None or not dims(y) or None in dims(y) or dims(y) != dims(total) or dims(y) != dims(result):
            return  # it broadcasts or might
        matrix = self.matrix(y) if len(dims(y)) > 2 else y
        gemm = ir.node("Gemm", [self.matrix(h) if len(dims(h)) > 2 else h, b, matrix])
        gemm.outputs[0].type = total.type
        if len(dims(y)) == 2:  # it may be the graph's output, which has to say its shape
            gemm.outputs[0].shape = total.shape
        gemm.name = f"{add.name}_gemm"
        self.graph.insert_before(add, [gemm])
        fused = gemm.outputs[0]
        if len(dims(y)) > 2 and not _only_reshaped(total):
            back = ir.node("Reshape", [fused, self.shape(y)])
            self.graph.insert_before(add, [back])
            self.backs[back.outputs[0]] = fused, back.inputs[1]  # type: ignore[assignment]
            fused = back.outputs[0]
            fused.shape, fused.type = total.shape, total.type
        name, total.name = total.name, f"{total.name}_before"
        total.replace_all_uses_with(fused, replace_graph_outputs=True)
        fused.name = name

    def matrix(self, value: ir.Value) -> ir.Value:
        """The value as (positions, features). If a MatMul produces it, flatten the MatMul's input instead."""
        if value not in self.matrices:
            node = value.producer()
            if node is not None and node.op_type == "MatMul" and _is_matrix(node.inputs[1]) and _only_added(value):
                x = node.inputs[0]
                assert x is not None
                made = ir.node("MatMul", [self.flattened(x), node.inputs[1]], name=node.name)
                made.metadata_props.update(node.metadata_props)
                made.outputs[0].shape, made.outputs[0].type = ir.Shape((None, dims(value)[-1])), value.type
                self._after(node, made)
                self.matrices[value] = made.outputs[0]
            else:
                self.matrices[value] = self.flattened(value)
        return self.matrices[value]

    def flattened(self, value: ir.Value) -> ir.Value:
        if value not in self.matrices:
            made = ir.node("Flatten", [value], {"axis": len(dims(value)) - 1})
            made.outputs[0].type = value.type
            self._after(value.producer(), made)
            self.matrices[value] = made.outputs[0]
        return self.matrices[value]

    def shape(self, value: ir.Value) -> ir.Value:
        """The shape for a reshape back: the value's leading axes, and -1 for the features."""
        leading = dims(value)[:-1]
        node = value.producer()
        if node is not None and node.op_type == "MatMul" and node.inputs[0] is not None:
            value = node.inputs[0]  # the MatMul's output is about to become a matrix
        if leading not in self.shapes:
            size = ir.node("Shape", [value], {"start": 0, "end": len(leading)})
            rest = self._rest()
            whole = ir.node("Concat", [size.outputs[0], rest], {"axis": 0})
            self._after(value.producer(), size)
            self.graph.insert_after(size, [whole])
            self.shapes[leading] = whole.outputs[0]
        return self.shapes[leading]

    def sink(self) -> None:
        """Move reshapes back below element-wise operators, so that these work on matrices too.

        Going through the graph in order: a Flatten of a reshaped-back matrix is replaced by the matrix itself. An
        element-wise operator whose inputs are all reshaped back, without broadcasting, reads the matrices instead, and
        one reshape back follows it. That reshape may be moved again by the next operator. `clean` deletes unused ones.
        """
        for node in list(self.graph):
            if node.op_type == "Flatten" and node.inputs[0] in self.backs:
                node.outputs[0].replace_all_uses_with(self.backs[node.inputs[0]][0])
            found = [self.backs.get(value) for value in node.inputs if value is not None]
            result = node.outputs[0]
            if node.op_type not in ELEMENTWISE or result.is_graph_output() or None in found or not found:
                continue
            if any(dims(value) != dims(result) for value in node.inputs if value is not None):
                continue  # it broadcasts
            _, shape = found[0]  # type: ignore[misc]
            for index, (matrix, _) in enumerate(found):  # type: ignore[misc]
                node.replace_input_with(index, matrix)
            back = ir.node("Reshape", [result, shape])
            back.outputs[0].shape, back.outputs[0].type = result.shape, result.type
            result.replace_all_uses_with(back.outputs[0])
            back.replace_input_with(0, result)
            result.shape = None
            self.graph.insert_after(node, [back])
            self.backs[back.outputs[0]] = result, shape

    def clean(self) -> None:
        """Remove nodes whose outputs nothing reads any more."""
        for node in reversed(list(self.graph)):
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                self.graph.remove(node, safe=True)

    def _rest(self) -> ir.Value:
        name = "graphpeft.rest"
        if name not in self.graph.initializers:
            tensor = ir.tensor(np.array([-1], np.int64), name=name)
            value = ir.Value(name=name, const_value=tensor, shape=ir.Shape([1]), type=ir.TensorType(tensor.dtype))
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def _after(self, node: ir.Node | None, new: ir.Node) -> None:
        if node is None:  # a graph input
            self.graph.insert_before(self.graph[0], [new])
        else:
            self.graph.insert_after(node, [new])


def _only_added(value: ir.Value) -> bool:
    """Whether a value has one reader, or only MatMuls as readers: then a matrix can serve all of them."""
    uses = list(value.uses())
    return not value.is_graph_output() and (len(uses) == 1 or all(use.node.op_type == "MatMul" for use in uses))


def _is_matrix(value: ir.Value | None) -> bool:
    return value is not None and len(dims(value)) == 2


def _only_reshaped(value: ir.Value) -> bool:
    """Whether all readers are reshapes to sizes that do not copy an axis of the value (no 0 in the shape)."""
    return not value.is_graph_output() and all(
        use.node.op_type == "Reshape" and use.idx == 0 and _absolute(use.node.inputs[1]) for use in value.uses()
    )


def _absolute(shape: ir.Value | None) -> bool:
    assert shape is not None
    if shape.const_value is not None:
        return not (shape.const_value.numpy() == 0).any()
    node = shape.producer()
    return (
        node is not None
        and node.op_type == "Concat"
        and all(one is not None and (one.const_value is None or _absolute(one)) for one in node.inputs)
    )
