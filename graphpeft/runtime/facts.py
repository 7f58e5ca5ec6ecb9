"""The metadata of an exported graph, and an adapter's sidecar. Both are read as untrusted input and validated."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import onnxruntime as ort

from graphpeft.errors import FileError
from graphpeft.files.foreign import plain, read_json, shortened
from graphpeft.runtime.adapter_file import SCHEMA, SUFFIX
from graphpeft.runtime.layout import AdapterInput, place

LARGEST = 2**63
"""Larger than any size or token that ONNX Runtime can count with."""
HEX, VERSION, NAMES = r"[0-9a-f]{64}", r"\d[\w.+!-]{0,99}", r"\w{1,200}(,\w{1,200})*"
TEXTS = {
    "base": HEX,
    "version": VERSION,
    "mode": "swappable|merged",
    "merged": NAMES,
    "quantized": "int4|int8",
    "accuracy_level": r"\d",
    "tolerance": r"\d[\d.e+-]{0,19}",
    "onnxruntime": VERSION,
}
"""Patterns of the metadata's text fields, where present."""


@dataclass(frozen=True)
class Facts:
    """The metadata of a graph that a session needs."""

    base: str
    """Fingerprint of the base model, in hex."""
    slots: tuple[AdapterInput, ...]
    generation: Mapping[str, Any]
    """Special tokens of a model that generates."""
    onnxruntime: str | None
    """The oldest ONNX Runtime that ran such graphs in tests; `None` in exports of earlier versions."""


def read_facts(path: Path, inference: ort.InferenceSession) -> Facts:
    """Read a graph's metadata. Raises `FileError` if it is missing, invalid, or does not match the graph."""
    given = inference.get_modelmeta().custom_metadata_map
    ours = {key.removeprefix("graphpeft."): str(text) for key, text in given.items() if key.startswith("graphpeft.")}
    if ours.get("schema") != str(SCHEMA):
        raise FileError(
            f"{path}: graphpeft.schema is {shortened(str(ours.get('schema')))!r} in the model's metadata, but this version reads "
            f"{SCHEMA}. Export the model again with this version of graphpeft."
        )
    for key, shape in TEXTS.items():
        if key in ours and not re.fullmatch(shape, ours[key]):
            raise _wrong(path, key, ours[key])
    if "base" not in ours:
        raise _wrong(path, "base", "")
    slots = _parsed(path, "slots", ours.get("slots", ""), _slots)
    generation = _parsed(path, "generation", ours.get("generation", "{}"), _generation)
    _check_open(path, slots, inference)
    return Facts(ours["base"], slots, generation, ours.get("onnxruntime"))


def read_sidecar(sidecar: Path) -> str:
    """The base model's fingerprint from a sidecar. Raises `FileError` if the file is not a valid sidecar."""
    adapter = sidecar.name.removesuffix(".json") + SUFFIX
    missing = (
        f"missing or unreadable. It states which base model {adapter} was trained on, which the adapter's own file cannot; copy "
        f"both files together."
    )
    if not sidecar.is_file():
        raise FileError(f"{sidecar}: {missing}")
    try:
        about = read_json(sidecar, free={"rules", "ranks"})
    except FileError as error:
        raise FileError(f"{sidecar}: {missing} ({error})") from error
    if not isinstance(about, dict):
        raise FileError(f"{sidecar}: {missing}")
    looks = {
        "base": isinstance(about.get("base"), str) and re.fullmatch(HEX, about["base"]) is not None,
        "adapter": isinstance(about.get("adapter", "a"), str)
        and re.fullmatch(NAMES, about.get("adapter", "a")) is not None,
        "rules": isinstance(about.get("rules", ""), str),
        "ranks": _are_sizes(about.get("ranks", {})),
    }
    if wrong := [name for name, good in looks.items() if not good]:
        raise FileError(f"{sidecar}: {missing} (No export writes this value of {wrong[0]}.)")
    return cast(str, about["base"])


def _parsed(path: Path, key: str, text: str, read: Callable[[Any], Any]) -> Any:
    try:
        if not plain(text, free=True):
            raise ValueError(key)
        return read(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _wrong(path, key, text) from error


def _slots(listed: Any) -> tuple[AdapterInput, ...]:
    if not isinstance(listed, list):
        raise TypeError(type(listed))
    slots = tuple(map(_slot, listed))
    names = [name for slot in slots for name in (*slot.sites, *slot.shapes)]
    if len(set(names)) < len(names) or not all(map(plain, names)):
        raise ValueError("names")
    return slots


def _slot(fields: Any) -> AdapterInput:
    if "tensors" in fields:
        shapes = fields["tensors"].values()
        good = isinstance(fields["site"], str) and all(isinstance(s, list) and all(map(_is_size, s)) for s in shapes)
    else:
        good = _is_size(fields["inputs"]) and bool(fields["sites"]) and _are_sizes(fields["sites"])
        good = good and isinstance(fields["rank"], str)
    if not good:
        raise TypeError(shortened(str(fields)))
    return place(fields)


def _generation(found: Any) -> Mapping[str, Any]:
    tokens = {"pad_token_id", "decoder_start_token_id", "eos_token_id"}
    if not isinstance(found, dict) or not found.keys() <= tokens:
        raise ValueError(shortened(str(found)))
    for value in found.values():
        if not all(map(_is_size, value if isinstance(value, list) else [value])):
            raise ValueError(shortened(str(value)))
    return cast("Mapping[str, Any]", found)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST


def _are_sizes(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_size, value.values()))


def _check_open(path: Path, slots: tuple[AdapterInput, ...], inference: ort.InferenceSession) -> None:
    """Check that every input of the slots is an optional input of the graph, with the same shape."""
    held = {node.name: tuple(node.shape) for node in inference.get_overridable_initializers()}
    for one in slots:
        for name, shape in one.shapes.items():
            if held.get(name) != tuple(shape):
                raise _wrong(path, "slots", f"{name} {shape}")


def _wrong(path: Path, key: str, text: str) -> FileError:
    return FileError(
        f"{path}: graphpeft.{key} in the model's metadata is {shortened(text)!r}, which no export writes for this graph. Usually "
        f"the file was edited or damaged. Copy it again from a source that you trust, or export the model again."
    )
