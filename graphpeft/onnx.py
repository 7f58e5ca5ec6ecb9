"""What the export does on the ONNX side: translate, census of the adapter slots, defaults, metadata, files.

The order of the steps matters: graph passes delete inputs that have a default, so a graph keeps its slots as
required inputs until `attach_defaults`, the last step before `save`.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import nn

from graphpeft import hf
from graphpeft.errors import ExportError
from graphpeft.runtime import SCHEMA, SUFFIX
from graphpeft.slots import Slot

LOWEST_OPSET = 18
PREFIX = "model."
"""Name that the translated wrapper gives the model; taken off every initializer's name."""


def translate(
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
    axes: Sequence[Mapping[int, str]],
    opset: int | None,
) -> ir.Model:
    """Translate a module whose forward takes `inputs` by position and returns a tuple; `axes` names dynamic ones.

    Raises:
        ExportError: the opset is too low, or torch.onnx refuses the module.
    """
    if opset is not None and opset < LOWEST_OPSET:
        raise ExportError(f"opset={opset}: torch.onnx writes {LOWEST_OPSET} or later. Leave opset out for its default.")
    try:
        with _quiet(), hf.translating() as translations:
            program = torch.onnx.export(
                module,
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=(tuple(dict(each) for each in axes),),
                opset_version=opset,
                custom_translation_table=translations,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        cause = error.__cause__ or error
        reason = next((line for line in str(cause).splitlines() if line.strip()), "")
        raise ExportError(
            f"torch.onnx cannot translate the model: {type(cause).__name__}: {reason} Usual causes: the forward "
            "branches on data or pins a dynamic size (batch, sequence). Remedy: pass other sample `inputs`, or make "
            "the model pass torch.export.export with dynamic shapes first."
        ) from error
    assert program is not None
    model: ir.Model = program.model
    if opset is not None and model.opset_imports[""] != opset:
        raise ExportError(f"opset={opset} was asked for, torch.onnx wrote {model.opset_imports['']}. Ask for that one.")
    _tidy(model)
    return model


def census(model: ir.Model, slots: Sequence[Slot]) -> None:
    """Check that every slot is a live input: A, then B, each read by one MatMul, with the rank left open.

    Raises:
        ExportError: names the first site whose slot was dropped, shared, bypassed or fixed to one rank.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    if len(inputs) != len(model.graph.inputs):
        raise ExportError("The graph lists an input twice; some tool registered the adapter slots again.")
    for slot in slots:
        for name, shape in ((slot.a, (slot.inputs, slot.rank)), (slot.b, (slot.rank, slot.outputs))):
            if (value := inputs.get(name)) is None:
                raise _dead(slot, f"the input {name} is gone")
            if value.shape is None or _dims(value) != shape:
                raise _dead(slot, f"the input {name} has shape {value.shape} instead of {list(shape)}")
        for product in _products(slot, inputs[slot.a]):
            middle = _dims(product.outputs[0])
            if inputs[slot.b] not in product.inputs and middle and middle[-1] != slot.rank:
                raise _dead(slot, f"the product with A has shape {list(middle)}, a fixed rank")
        _products(slot, inputs[slot.b])


def attach_defaults(model: ir.Model, slots: Sequence[Slot]) -> None:
    """Give every slot a default of rank 0, which adds nothing: without an adapter the graph is the base model."""
    inputs = {value.name: value for value in model.graph.inputs}
    for slot in slots:
        for name, shape in ((slot.a, (slot.inputs, 0)), (slot.b, (0, slot.outputs))):
            value = inputs[name]
            assert value.dtype is not None, "a graph input has a type"
            value.const_value = ir.tensor(np.zeros(shape, value.dtype.numpy()), name=name)
            model.graph.register_initializer(value)


def save(model: ir.Model, path: Path, slots: Sequence[Slot], properties: Mapping[str, str]) -> None:
    """Write the graph to `path`, and tensors of 1 KiB or more next to it: shape constants and slots must stay inline.

    Raises:
        ExportError: onnx.checker, which infers all shapes anew, refuses what was written.
    """
    table = json.dumps([asdict(slot) | {"A": slot.a, "B": slot.b} for slot in slots])
    model.metadata_props.update({"graphpeft.schema": str(SCHEMA), "graphpeft.slots": table, **properties})
    ir.save(model, path, external_data=path.name + ".data", size_threshold_bytes=1024)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ExportError(f"onnx.checker refuses the exported graph: {error}") from error


def annotate(path: Path, properties: Mapping[str, str]) -> None:
    """Add metadata to a saved graph."""
    proto = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(proto, {each.key: each.value for each in proto.metadata_props} | dict(properties))
    onnx.save(proto, path)


def opset(path: Path) -> int:
    """The opset of a saved graph."""
    proto = onnx.load(path, load_external_data=False)
    return next(int(each.version) for each in proto.opset_import if each.domain in ("", "ai.onnx"))


def write_adapter(folder: Path, name: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Write NAME.onnx_adapter and NAME.json; `facts["base"]` is the base model's fingerprint, in hex."""
    file = ort.AdapterFormat()
    file.set_adapter_version(SCHEMA)
    file.set_model_version(int(facts["base"][:8], 16) >> 1)  # a signed 32-bit field
    values = {key: ort.OrtValue.ortvalue_from_numpy(tensor.cpu().numpy()) for key, tensor in tensors.items()}
    file.set_parameters(values)
    file.export_adapter(str(folder / (name + SUFFIX)))
    text = json.dumps({"schema": SCHEMA, "adapter": name, **facts}, indent=1)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def _dead(slot: Slot, what: str) -> ExportError:
    return ExportError(
        f"{slot.site}: the adapter slot did not survive the translation: {what}. An adapter would silently do nothing "
        "there. Usual cause: a graph pass that fuses or folds around the slot. Remedy: export with merged=True."
    )


def _dims(value: ir.Value) -> tuple[int | str | None, ...]:
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape) if value.shape is not None else ()


def _products(slot: Slot, value: ir.Value) -> list[ir.Node]:
    """The MatMuls that read a slot's input; a weight with several call sites has several."""
    readers = [use.node for use in value.uses()]
    if strange := [node.op_type for node in readers if node.op_type != "MatMul"]:
        raise _dead(slot, f"{value.name} goes into {strange[0]} instead of MatMul")
    if not readers:
        raise _dead(slot, f"nothing reads {value.name}")
    return readers


def _tidy(model: ir.Model) -> None:
    """Name initializers as the model does, and drop the tracing notes: they quote this machine's paths."""
    taken = {value.name for value in (*model.graph.inputs, *model.graph.initializers.values())}
    for value in list(model.graph.initializers.values()):
        origin = value.metadata_props.get("pkg.onnxscript.optimizer.folded_from", "")
        name = origin[2:-2] if origin.startswith(f"['{PREFIX}") and origin.count("'") == 2 else str(value.name)
        if name.startswith(PREFIX) and (name := name.removeprefix(PREFIX)) not in taken:
            taken.add(name)
            value.name = name
    outputs = [value for node in model.graph for value in node.outputs]
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *outputs):
        value.metadata_props.clear()
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        node.metadata_props.clear()
        if scopes:
            node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes
    model.graph.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide torch.onnx's remarks on unused axis names and absent packages; its errors still come through."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
