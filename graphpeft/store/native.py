"""graphpeft's own adapter format: tensors in `adapter.safetensors`, everything else in `adapter.json`.

The folder is self-contained: rules, seed, sites with their rows, and methods with every option spelled out. Loading it
needs no capture, and later changes of defaults do not affect old adapters. Tensors that the seed regenerates are not
stored.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from graphpeft.errors import FileError, RuleError
from graphpeft.files.foreign import read_bytes, read_json, shortened
from graphpeft.files.pair import Pair
from graphpeft.planning.plan import Entry
from graphpeft.store.entries import described, parsed, read_entry
from graphpeft.store.fingerprint import SHAPE as FINGERPRINT
from graphpeft.store.finite import odd_tensors, warn_of

FORMAT, VERSION = "graphpeft", 1
TENSORS, DESCRIPTION = "adapter.safetensors", "adapter.json"
TRIES, PAUSE = 5, 0.02
"""How often a folder is read again whose files do not fit, because another process may be writing it; and a pause in
seconds."""


@dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter folder."""

    name: str
    rules: str
    seed: int
    entries: tuple[Entry, ...]
    tensors: Mapping[str, torch.Tensor]
    fingerprint: str
    """Fingerprint of the base weights that the adapter was trained on."""


def write_adapter(folder: Path, adapter: AdapterFile) -> None:
    """Write both files, so that a kill at any moment leaves the old adapter or the new one."""
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in adapter.tensors.items()}
    data = save_tensors(tensors, {"format": "pt"})
    description = {
        "format": FORMAT,
        "version": VERSION,
        "name": adapter.name,
        "rules": adapter.rules,
        "seed": adapter.seed,
        "base_fingerprint": adapter.fingerprint,
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
        "versions": {name: version(name) for name in ("graphpeft", "torch")},
        "sites": [described(entry) for entry in adapter.entries],
    }
    warn_of(odd_tensors(tensors, adapter.entries), folder, "They are saved as they are.", stacklevel=8)
    PAIR.write(folder, (json.dumps(description, indent=1) + "\n").encode(), data)


def read_adapter(folder: Path) -> AdapterFile:
    """Read and check an adapter folder. Raises `FileError` for anything missing, torn, foreign or newer."""
    about, data = _both(folder)
    try:
        tensors = load_tensors(data)
        parsed(about["rules"])
        entries = tuple(map(read_entry, about["sites"]))
        if len({entry.site.key for entry in entries}) < len(entries):
            raise ValueError("a site is listed twice")
    except (safetensors.SafetensorError, RuleError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise FileError(
            f"{folder} cannot be understood: {shortened(str(error), 500)}. Usually it was written by another version of "
            f"graphpeft, or edited by hand. Save the adapter again with the version that made it."
        ) from error
    return AdapterFile(about["name"], about["rules"], about["seed"], entries, tensors, about["base_fingerprint"])


def _describes(head: bytes, data: Path) -> bool:
    """Whether a description holds the digest of a file of tensors."""
    try:
        about = json.loads(head)
    except (ValueError, RecursionError):
        return False
    return isinstance(about, dict) and about.get("tensors_sha256") == hashlib.sha256(read_bytes(data)).hexdigest()


PAIR = Pair(DESCRIPTION, TENSORS, _describes)


def _both(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The description, and the tensors that it describes, from one moment."""
    about, unchanged = _describe(folder), 0
    while True:
        try:
            return about, _tensors(folder, about["tensors_sha256"])
        except FileError:
            if unchanged == TRIES:
                raise
            time.sleep(PAUSE)
            before, about = about, _describe(folder)
            unchanged = unchanged + 1 if about == before else 0


def _tensors(folder: Path, digest: str) -> bytes:
    """The tensors with this digest."""
    try:
        data = read_bytes(PAIR.find(folder))
    except OSError as error:
        raise FileError(f"{folder / TENSORS} cannot be read: {error}. An adapter folder needs both files.") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise FileError(
            f"{folder / TENSORS} is not the file that {DESCRIPTION} describes: it was cut short, changed, or copied from "
            f"another adapter. Copy the whole folder again."
        )
    return data


def _describe(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not path.is_file():
        found = sorted(p.name for p in folder.iterdir())[:5] if folder.is_dir() else []
        inside = [p.parent.name for p in folder.glob("*/adapter_config.json")] if folder.is_dir() else []
        foreign = f" Its folders {', '.join(inside)} hold adapters of PEFT." if inside else ""
        raise FileError(
            f"{folder} is not a graphpeft adapter: there is no {DESCRIPTION}"
            + (f" (it holds {', '.join(found)})." if found else ".")
            + f"{foreign} Pass a folder that gp.save or PEFT wrote."
        )
    about = read_json(path, free=FREE)
    needed = {"format": str, "version": int, "name": str, "rules": str, "seed": int, "base_fingerprint": str,
              "tensors_sha256": str, "sites": list}  # fmt: skip
    wrong = [k for k, kind in needed.items() if not isinstance(about, dict) or not isinstance(about.get(k), kind)]
    if wrong or about["format"] != FORMAT:
        raise FileError(
            f"{path} is not a description of a graphpeft adapter: {', '.join(wrong) or 'format'} missing or wrong."
        )
    for field, shape in SHAPES.items():
        if not shape(about.get(field)):
            raise FileError(
                f"{path}: its {field} is {shortened(str(about.get(field)))!r}, which gp.save never writes. Usually the file was "
                f"edited or damaged. Copy the folder again from a source that you trust."
            )
    if about["version"] > VERSION:
        raise FileError(
            f"{path} has format version {about['version']}; this graphpeft reads up to {VERSION}. Update graphpeft."
        )
    unknown = sorted(about.keys() - needed.keys() - {"versions"})
    if unknown:
        warnings.warn(f"{path} has fields that this version ignores: {', '.join(unknown)}", stacklevel=5)
    return about


def _is_hex(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _are_versions(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(each, str) and re.fullmatch(r"\d[\w.+!-]{0,99}", each) for each in value.values()
    )


FREE = {"rules", "rule", "method", "weight", "owner"}
"""Fields with any characters: rules, which are parsed, and module names, which are looked up in the model."""
SHAPES: dict[str, Callable[[Any], bool]] = {
    # Earlier versions allowed keywords as names; loading such a file requires another name.
    "name": lambda value: isinstance(value, str) and re.fullmatch(r"[A-Za-z_]\w{0,199}", value) is not None,
    "base_fingerprint": lambda value: isinstance(value, str) and re.fullmatch(FINGERPRINT, value) is not None,
    "tensors_sha256": _is_hex,
    "versions": lambda value: value is None or _are_versions(value),
}
