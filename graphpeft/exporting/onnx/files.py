"""Files of an export: the graph with its metadata, and adapters in ONNX Runtime's format, each with a sidecar."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from graphpeft.errors import ExportError
from graphpeft.files import atomic
from graphpeft.runtime.adapter_file import SCHEMA, SUFFIX, write
from graphpeft.runtime.layout import AdapterInput, Arrays
from graphpeft.tracing import as_pass


@as_pass("write", "write a graph to its file")
def save(model: ir.Model, path: Path, slots: Sequence[AdapterInput], properties: Mapping[str, str]) -> None:
    """Write the graph to `path`, and tensors of 1 KiB or more to a file beside it. Shape constants and slots stay inline.

    Raises:
        ExportError: onnx.checker, which infers all shapes again, rejects the file, or the disk is full.
    """
    table = json.dumps([slot.as_dict() for slot in slots])
    model.metadata_props.update({"graphpeft.schema": str(SCHEMA), "graphpeft.slots": table, **properties})
    ir.save(model, path, external_data=path.name + ".data", size_threshold_bytes=1024)
    _require_whole(path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ExportError(f"onnx.checker refuses the exported graph: {error}") from error


def _require_whole(path: Path) -> None:
    """Raise if the weights were cut off: writing to a full disk can lose their end without an error."""
    data = path.with_name(path.name + ".data")
    needed = 0
    for each in onnx.load(path, load_external_data=False).graph.initializer:
        where = {entry.key: entry.value for entry in each.external_data}
        if where:
            needed = max(needed, int(where["offset"]) + int(where["length"]))
    size = data.stat().st_size if data.exists() else 0
    if size < needed:
        raise ExportError(f"{data.name}: {size} of {needed} bytes were written. Usually the disk is full; make room.")


def annotate(path: Path, properties: Mapping[str, str]) -> None:
    """Add metadata to a saved graph."""
    proto = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(proto, {each.key: each.value for each in proto.metadata_props} | dict(properties))
    onnx.save(proto, path)


def opset(path: Path) -> int:
    """The opset of a saved graph."""
    proto = onnx.load(path, load_external_data=False)
    return next(int(each.version) for each in proto.opset_import if each.domain in ("", "ai.onnx"))


def write_adapter(folder: Path, name: str, parts: Mapping[str, Arrays], facts: Mapping[str, Any]) -> None:
    """Write NAME.json and NAME.onnx_adapter, or a NAME.PART.onnx_adapter for each of several graphs.

    `facts["base"]` is the base model's fingerprint, in hex.
    """
    for part, tensors in parts.items():
        write(folder / (name + ("" if len(parts) == 1 else f".{part}") + SUFFIX), tensors, facts["base"])
    text = json.dumps({"schema": SCHEMA, "adapter": name, **facts}, indent=1)
    atomic.write(folder / f"{name}.json", f"{text}\n".encode())
