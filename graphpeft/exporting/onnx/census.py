"""Check that a graph's slots are alive, after every pass: a slot that a pass dropped would silently do nothing.

Graph passes delete inputs that have a default. So slots stay required inputs until `attach_defaults`, the last pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphpeft.errors import ExportError
from graphpeft.runtime.layout import AdapterInput, NativeSlot, Slot, b_of
from graphpeft.tracing import as_pass


@as_pass("census", "check that every slot is still a live input")
def census(model: ir.Model, slots: Sequence[AdapterInput]) -> None:
    """Check that every slot is a live input: A, then each B, read by MatMuls, with the rank left open.

    Raises:
        ExportError: names the first site whose slot was dropped, shared, bypassed or fixed to one rank.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    if len(inputs) != len(model.graph.inputs):
        raise ExportError("The graph lists an input twice; some tool registered the adapter slots a second time.")
    for slot in slots:
        for name, shape in slot.shapes.items():
            if (value := inputs.get(name)) is None:
                raise dead(slot, f"the input {name} is gone")
            if value.shape is None or dims(value) != shape:
                raise dead(slot, f"the input {name} has shape {value.shape} instead of {list(shape)}")
        if isinstance(slot, NativeSlot):
            if unread := [name for name in slot.shapes if not inputs[name].uses()]:
                raise dead(slot, f"nothing reads {unread[0]}")
            continue
        for product in products(slot, inputs[slot.a]):
            middle = dims(product.outputs[0])
            if middle and middle[-1] != slot.rank and not _is_b(product, slot):
                raise dead(slot, f"the product with A has shape {list(middle)}, a fixed rank")
        for site in slot.sites:
            products(slot, inputs[b_of(site)])


def used(model: ir.Model, slots: Sequence[AdapterInput]) -> tuple[AdapterInput, ...]:
    """The slots that this graph reads; the inputs of all other slots are removed."""
    inputs = {value.name: value for value in model.graph.inputs}
    found = []
    for slot in slots:
        values = [inputs[name] for name in slot.shapes]
        if any(value.uses() for value in values):
            found.append(slot)
        else:
            for value in values:
                model.graph.inputs.remove(value)
    return tuple(found)


def products(slot: Slot, value: ir.Value) -> list[ir.Node]:
    """The MatMuls (for B, also Gemms) that read a slot's input; one per call site of the weight."""
    readers = [use.node for use in value.uses()]
    known = {"MatMul"} if value.name == slot.a else {"MatMul", "Gemm"}
    if strange := [node.op_type for node in readers if node.op_type not in known]:
        raise dead(slot, f"{value.name} goes into {strange[0]} instead of MatMul")
    if not readers:
        raise dead(slot, f"nothing reads {value.name}")
    return readers


@as_pass("defaults", "give every slot a default of rank 0")
def attach_defaults(model: ir.Model, slots: Sequence[AdapterInput]) -> None:
    """Give every slot a default of rank 0, or zeros, which adds nothing: without an adapter the graph is the base."""
    inputs = {value.name: value for value in model.graph.inputs}
    for slot in slots:
        for name, shape in slot.shapes.items():
            value = inputs[name]
            assert value.dtype is not None, "a graph input has a type"
            empty = [size if isinstance(size, int) else 0 for size in shape]
            attach(model, value, np.zeros(empty, value.dtype.numpy()))


def attach(model: ir.Model, value: ir.Value, default: np.ndarray) -> None:
    """Make an input optional."""
    value.const_value = ir.tensor(default, name=value.name)
    model.graph.register_initializer(value)


def dims(value: ir.Value) -> tuple[int | str | None, ...]:
    """Sizes and symbols of a value's shape; none if it is unknown."""
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape) if value.shape is not None else ()


def _is_b(product: ir.Node, slot: Slot) -> bool:
    names = [b_of(site) for site in slot.sites]
    return any(value is not None and value.name in names for value in product.inputs)


def dead(slot: AdapterInput, what: str) -> ExportError:
    return ExportError(
        f"{slot.label}: the adapter slot did not survive the translation: {what}. An adapter would silently do nothing "
        "there. Usual cause: a graph pass that fuses or folds around the slot. Remedy: export with merged=True."
    )
