"""Translate a PyTorch module to an ONNX graph, with the model's own names and without this machine's paths."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import onnx_ir as ir
import torch
from torch import nn

from graphpeft.compat import transformers_export as hf
from graphpeft.errors import ExportError
from graphpeft.tracing import as_pass

LOWEST_OPSET, DEFAULT_OPSET = 18, 23
"""From opset 23 on, attention, rotary embeddings and RMS norms are single operators, which makes decoding faster."""
PREFIX = "model."
"""The wrapper's name for the model; it is removed from the initializers' names."""


@as_pass("translate", "translate the module with torch.onnx")
def translate(
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
    axes: Sequence[Mapping[int, str]],
    opset: int = DEFAULT_OPSET,
    prefix: str = "",
) -> ir.Model:
    """Translate a module whose forward takes `inputs` by position and returns a tuple; `axes` names the dynamic axes.

    `prefix` is removed from the names of the initializers.

    Raises:
        ExportError: the opset is too low, or torch.onnx fails on the module.
    """
    if opset < LOWEST_OPSET:
        raise ExportError(
            f"opset={opset}: torch.onnx writes {LOWEST_OPSET} or later. Leave opset out for {DEFAULT_OPSET}."
        )
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
    if model.opset_imports[""] != opset:
        raise ExportError(
            f"opset={opset} was requested, but torch.onnx wrote {model.opset_imports['']}. Request that one."
        )
    _tidy(model, PREFIX + prefix)
    return model


def _tidy(model: ir.Model, prefix: str) -> None:
    """Give initializers the model's names, and drop tracing metadata, which contains this machine's paths."""
    taken = {value.name for value in (*model.graph.inputs, *model.graph.initializers.values())}
    for value in list(model.graph.initializers.values()):
        origin = value.metadata_props.get("pkg.onnxscript.optimizer.folded_from", "")
        name = origin[2:-2] if origin.startswith(f"['{prefix}") and origin.count("'") == 2 else str(value.name)
        if name.startswith(prefix) and (name := name.removeprefix(prefix)) not in taken:
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
    """Hide torch.onnx's warnings about unused axis names and missing packages; its errors are still raised."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
