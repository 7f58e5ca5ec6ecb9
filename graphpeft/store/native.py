"""graphpeft's own adapter format: tensors in `adapter.safetensors`, everything else in `adapter.json`.

The folder is self-contained: rules, seed, sites with their rows, methods with every option spelled out. Loading it
needs no capture, and a later change of defaults does not change an old adapter. Tensors that a seed regenerates are
not stored.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from graphpeft.errors import FileError, RuleError
from graphpeft.methods import options
from graphpeft.plan import Entry
from graphpeft.program import Site
from graphpeft.rules import parse
from graphpeft.store.files import write

FORMAT, VERSION = "graphpeft", 1
TENSORS, DESCRIPTION = "adapter.safetensors", "adapter.json"


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter folder holds."""

    name: str
    rules: str
    seed: int
    entries: tuple[Entry, ...]
    tensors: Mapping[str, torch.Tensor]
    fingerprint: str
    """Of the base weights that the adapter was trained on."""


def write_adapter(folder: Path, adapter: AdapterFile) -> None:
    """Write both files, tensors first; the description holds their digest, so a torn pair is noticed on reading."""
    data = save_tensors({k: t.detach().cpu().contiguous() for k, t in adapter.tensors.items()}, {"format": "pt"})
    description = {
        "format": FORMAT,
        "version": VERSION,
        "name": adapter.name,
        "rules": adapter.rules,
        "seed": adapter.seed,
        "base_fingerprint": adapter.fingerprint,
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
        "versions": {name: version(name) for name in ("graphpeft", "torch")},
        "sites": [
            {**asdict(e.site), "method": e.method.text([o.name for o in options(type(e.method))]), "rule": e.rule}
            for e in adapter.entries
        ],
    }
    write(folder / TENSORS, data)
    write(folder / DESCRIPTION, (json.dumps(description, indent=1) + "\n").encode())


def read_adapter(folder: Path) -> AdapterFile:
    """Read and check an adapter folder. Raises `FileError` for anything missing, torn, foreign or newer."""
    about = _describe(folder)
    try:
        data = (folder / TENSORS).read_bytes()
    except OSError as error:
        raise FileError(f"{folder / TENSORS} cannot be read: {error}. An adapter folder needs both files.") from error
    if hashlib.sha256(data).hexdigest() != about["tensors_sha256"]:
        raise FileError(
            f"{folder / TENSORS} is not the file that {DESCRIPTION} describes: it was cut short, changed, or copied from "
            f"another adapter. Copy the whole folder again."
        )
    try:
        tensors = load_tensors(data)
        entries = tuple(_entry(site) for site in about["sites"])
    except (safetensors.SafetensorError, RuleError, KeyError, TypeError, ValueError) as error:
        raise FileError(
            f"{folder} cannot be understood: {error}. Usually it was written by another version of graphpeft, or edited by "
            f"hand. Save the adapter again with the version that made it."
        ) from error
    return AdapterFile(about["name"], about["rules"], about["seed"], entries, tensors, about["base_fingerprint"])


def _describe(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not path.is_file():
        found = sorted(p.name for p in folder.iterdir())[:5] if folder.is_dir() else []
        foreign = (
            " It looks like a PEFT adapter, which this version does not read." if "adapter_config.json" in found else ""
        )
        raise FileError(
            f"{folder} is no graphpeft adapter: there is no {DESCRIPTION}"
            + (f" (it holds {', '.join(found)})." if found else ".")
            + f"{foreign} Pass a folder that gp.save wrote."
        )
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(
            f"{path} is not readable JSON: {error}. It was cut short or edited; copy the folder again."
        ) from error
    needed = {"format": str, "version": int, "name": str, "rules": str, "seed": int, "base_fingerprint": str,
              "tensors_sha256": str, "sites": list}  # fmt: skip
    wrong = [k for k, kind in needed.items() if not isinstance(about, dict) or not isinstance(about.get(k), kind)]
    if wrong or about["format"] != FORMAT:
        raise FileError(
            f"{path} is not a description of a graphpeft adapter: {', '.join(wrong) or 'format'} missing or wrong."
        )
    if about["version"] > VERSION:
        raise FileError(
            f"{path} has format version {about['version']}; this graphpeft reads up to {VERSION}. Update graphpeft."
        )
    unknown = sorted(about.keys() - needed.keys() - {"versions"})
    if unknown:
        warnings.warn(f"{path} has fields that this version ignores: {', '.join(unknown)}", stacklevel=4)
    return about


def _entry(saved: Mapping[str, Any]) -> Entry:
    # A method is only ever written in a rule, so a rule is what reads it.
    return Entry(_site(saved), parse(f"linear:{saved['method']}")[0].method, str(saved["rule"]))


def _site(saved: Mapping[str, Any]) -> Site:
    known = {f.name for f in fields(Site)}
    values = {k: v for k, v in saved.items() if k in known}
    values["rows"] = tuple((int(a), int(b)) for a, b in values["rows"]) if values["rows"] else None
    values["shape"] = tuple(map(int, values["shape"]))
    values["tied"] = tuple(map(_site, values.get("tied", ())))
    return Site(**values)


def fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    """A digest of base weights: names, shapes and 64 values of each, enough to tell one checkpoint from another.

    Values count as rounded to bfloat16, so that a float32 checkpoint and its bfloat16 copy are one base.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        if not weight.is_meta:
            step = max(1, weight.numel() // 64)
            digest.update(
                weight.detach().flatten()[::step][:64].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
            )
    return digest.hexdigest()
