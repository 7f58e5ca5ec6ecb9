"""Check an export's arguments before anything is traced or written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from graphpeft.compat.quantized import quantized
from graphpeft.compat.sharded import ELSEWHERE, refuse_sharded
from graphpeft.errors import ExportError
from graphpeft.exporting.onnx.quantize import ROUNDED
from graphpeft.rewrite.state import get_state, names
from graphpeft.runtime.own_files import REPORT

RESERVED = {
    Path(REPORT).stem, "genai_config", "tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens", "vocab",
    "processor_config", "preprocessor_config", "generation_config", "config",
}  # fmt: skip
"""Names that an adapter cannot have, because its sidecar would overwrite a JSON file of the export or the tokenizer."""


def check_options(
    verify: str, quantize: str | None, accuracy_level: int, compact: bool, per_row: bool, merged: bool
) -> None:
    """Raise `ExportError` for an unknown option value, or for two options that exclude each other."""
    if verify not in ("off", "fast", "full"):
        raise ExportError(f'verify={verify!r}: it must be one of "off", "fast", "full".')
    if quantize not in (None, "int4", "int8"):
        raise ExportError(f'quantize={quantize!r}: it must be "int4", "int8" or None.')
    if accuracy_level not in (0, ROUNDED):
        raise ExportError(
            f"accuracy_level={accuracy_level!r}: it must be {ROUNDED}, which rounds activations of int4 products to 8 bits, or 0."
        )
    if compact and (per_row or merged):
        raise ExportError("compact=True cannot be combined with per_row=True or merged=True. Choose one.")


def exported_names(model: nn.Module, merged: bool, adapters: str | Sequence[str] | None) -> tuple[str, ...]:
    """The adapters to write or fold in. Raises `ExportError` if there are none, `AdapterError` for an unknown name."""
    state = get_state(model)
    if not merged:
        chosen = names(model, adapters if adapters is None or isinstance(adapters, str) else tuple(adapters))
    elif adapters is not None:
        raise ExportError("merged=True folds the active adapters and takes no names; gp.activate chooses them.")
    else:
        chosen = state.merged or tuple(state.active)
    if not chosen:
        raise ExportError("No adapter is " + ("active: call gp.activate(model, name) first." if merged else "chosen."))
    if taken := sorted(RESERVED.intersection(chosen)):
        raise ExportError(
            f"No adapter of an export can be called {taken[0]!r}: {taken[0]}.json is another file of the export. Rename it "
            f"first, with gp.rename."
        )
    return tuple(dict.fromkeys(chosen))


def refuse_inexportable(model: nn.Module) -> None:
    """Raise for weights that are sharded, offloaded, or quantized in a form that torch.onnx has no operators for."""
    refuse_sharded(model, "export", ELSEWHERE)
    absent = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if absent is not None:
        raise ExportError(
            f"{absent} has no values here: it is on the meta device. Usually accelerate offloaded it. Load the model whole and "
            f"the adapter with gp.load."
        )
    found = quantized(model)
    if found:
        name, known = next(iter(found.items()))
        raise ExportError(
            f"{name} is quantized by {known}, which cannot be translated to ONNX. Load the base in float, gp.load(model, folder, "
            f'any_base=True), and gp.export(model, path, quantize="int4") or "int8", which quantizes for ONNX Runtime.'
        )
