"""graphpeft's own adapter format: tensors in `adapter.safetensors`, everything else in `adapter.json`.

The folder is self-contained: rules, seed, sites with their rows, methods with every option spelled out. Loading it
needs no capture, and a later change of defaults does not change an old adapter. Tensors that a seed regenerates are
not stored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from graphpeft.errors import FileError, RuleError
from graphpeft.match.registry import check_name
from graphpeft.methods import options
from graphpeft.names import is_name
from graphpeft.plan import Entry
from graphpeft.program import Site
from graphpeft.rules import Rule, parse
from graphpeft.store.files import write
from graphpeft.store.foreign import LONGEST, read_json, shortened

FORMAT, VERSION = "graphpeft", 1
TENSORS, DESCRIPTION = "adapter.safetensors", "adapter.json"
ASIDE = f".{TENSORS}.new"


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
    """Write both files, so that a kill at any moment leaves the old adapter or the new one.

    New tensors stand aside until their description, which holds their digest, has replaced the old one.
    """
    with contextlib.suppress(OSError, FileError):  # a kill may have left the tensors of what is there aside
        _tensors(folder, json.loads((folder / DESCRIPTION).read_bytes())["tensors_sha256"], settle=True)
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
            {**_described(e.site), "method": e.method.text([o.name for o in options(type(e.method))]), "rule": e.rule}
            for e in adapter.entries
        ],
    }
    write(folder / ASIDE, data)
    write(folder / DESCRIPTION, (json.dumps(description, indent=1) + "\n").encode())
    (folder / ASIDE).replace(folder / TENSORS)


def _described(site: Site) -> dict[str, Any]:
    """The fields of a site; the file that its code is in may have any name, and no more of it is kept than a text may have."""
    about = asdict(site)
    for each in (about, *about["tied"]):
        each["source"] = re.sub(r"[^\w.:<> -]", "_", each["source"])[-LONGEST:]
    return about


def read_adapter(folder: Path) -> AdapterFile:
    """Read and check an adapter folder. Raises `FileError` for anything missing, torn, foreign or newer."""
    about = _describe(folder)
    data = _tensors(folder, about["tensors_sha256"])
    try:
        tensors = load_tensors(data)
        _parsed(about["rules"])
        entries = tuple(_entry(site) for site in about["sites"])
        if len({entry.site.key for entry in entries}) < len(entries):
            raise ValueError("a site is there twice")
    except (safetensors.SafetensorError, RuleError, KeyError, TypeError, ValueError) as error:
        raise FileError(
            f"{folder} cannot be understood: {shortened(str(error), 500)}. Usually it was written by another version of "
            f"graphpeft, or edited by hand. Save the adapter again with the version that made it."
        ) from error
    return AdapterFile(about["name"], about["rules"], about["seed"], entries, tensors, about["base_fingerprint"])


def _tensors(folder: Path, digest: str, settle: bool = False) -> bytes:
    """The file of tensors that has this digest, which a kill may have left aside; with `settle` it gets its name."""
    failed: OSError | None = None
    for path in (folder / TENSORS, folder / ASIDE):
        try:
            data = path.read_bytes()
        except OSError as error:
            failed = failed or error
            continue
        if hashlib.sha256(data).hexdigest() == digest:
            if settle and path.name == ASIDE:
                path.replace(folder / TENSORS)
            return data
    if failed is not None and failed.filename == str(folder / TENSORS):
        raise FileError(f"{folder / TENSORS} cannot be read: {failed}. An adapter folder needs both files.") from failed
    raise FileError(
        f"{folder / TENSORS} is not the file that {DESCRIPTION} describes: it was cut short, changed, or copied from "
        f"another adapter. Copy the whole folder again."
    )


def _describe(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not path.is_file():
        found = sorted(p.name for p in folder.iterdir())[:5] if folder.is_dir() else []
        inside = [p.parent.name for p in folder.glob("*/adapter_config.json")] if folder.is_dir() else []
        foreign = f" PEFT's adapters are in its folders {', '.join(inside)}." if inside else ""
        raise FileError(
            f"{folder} is no graphpeft adapter: there is no {DESCRIPTION}"
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
                f"edited or damaged. Copy the folder again, from where you trust it."
            )
    if about["version"] > VERSION:
        raise FileError(
            f"{path} has format version {about['version']}; this graphpeft reads up to {VERSION}. Update graphpeft."
        )
    unknown = sorted(about.keys() - needed.keys() - {"versions"})
    if unknown:
        warnings.warn(f"{path} has fields that this version ignores: {', '.join(unknown)}", stacklevel=4)
    return about


def _is_hex(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _are_versions(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(each, str) and re.fullmatch(r"\d[\w.+!-]{0,99}", each) for each in value.values()
    )


FREE = {"rules", "rule", "method", "weight", "owner"}
"""Fields with texts in quotes, or with names of modules. The former are parsed, the latter looked up in the model."""
SHAPES: dict[str, Callable[[Any], bool]] = {
    "name": is_name,
    "base_fingerprint": _is_hex,
    "tensors_sha256": _is_hex,
    "versions": lambda value: value is None or _are_versions(value),
}


def _entry(saved: Any) -> Entry:
    # A method is only ever written in a rule, so a rule is what reads it.
    site = _site(saved)
    _parsed(saved["rule"])
    (rule,) = _parsed(f"linear:{saved['method']}")
    return Entry(site, rule.method, saved["rule"])


@lru_cache(1000)
def _parsed(text: str) -> tuple[Rule, ...]:
    """The rules of a text, which may name roles that this process does not know. Raises `RuleError`."""
    roles = {word for word in re.findall(r"[A-Za-z_][\w.]*", text, re.ASCII) if _is_role(word)}
    return parse(text, sorted(roles))


def _is_role(text: str) -> bool:
    try:
        check_name(text)
    except RuleError:
        return False
    return len(text) <= LONGEST_ROLE


LONGEST_ROLE = 100


KINDS: dict[str, tuple[type, ...]] = {
    "role": (str,), "weight": (str,), "cross": (bool,), "layer": (int, type(None)), "form": (str,), "owner": (str,),
    "full": (int,), "transposed": (bool,), "stack": (int, type(None)), "calls": (int,), "source": (str,),
    "rows": (list, type(None)), "shape": (list,), "tied": (list,),
}  # fmt: skip
"""Of a site's fields, as JSON gives them."""


def _site(saved: Any) -> Site:
    """A site of a file. Raises `ValueError`, `TypeError` or `KeyError` for what cannot be one."""
    if not isinstance(saved, dict):
        raise TypeError(f"{str(saved)[:40]!r} is no site")
    values = {k: v for k, v in saved.items() if k in {f.name for f in fields(Site)}}
    for name, value in values.items():
        if type(value) not in KINDS[name]:
            raise TypeError(f"a site's {name} is {str(value)[:40]!r}")
    rows, shape = values["rows"], values["shape"]
    values["rows"] = tuple((_size(a, least=0), _size(b)) for a, b in rows) if rows else None
    values["shape"] = tuple(map(_size, shape))
    if not _is_role(values["role"]):
        raise ValueError(f"a site has the role {shortened(values['role'])!r}")
    if values.get("owner") and not values["weight"].startswith(f"{values['owner']}."):
        raise ValueError(f"{shortened(values['weight'])} is not in {shortened(values['owner'])}")
    if len(shape) != 2 or values.get("form", "branch") not in {"branch", "weight"}:
        raise ValueError(f"a site has shape {shape} and form {values.get('form')!r}")
    bounds = [0, *(bound for run in values["rows"] or () for bound in run), values.get("full") or shape[0]]
    if bounds != sorted(bounds):
        raise ValueError(f"a site has rows {rows} of {bounds[-1]}")
    values["tied"] = tuple(map(_site, values.get("tied", ())))
    made = Site(**values)
    if len({(place.owner, place.weight, place.role) for place in (made, *made.tied)}) <= len(made.tied):
        raise ValueError(f"{made.weight} is tied to itself")
    return made


def _size(value: Any, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{str(value)[:40]!r} is no size")
    return value


def fingerprint(names: Iterable[str], weight_of: Callable[[str], torch.Tensor]) -> str:
    """A digest of base weights: names, shapes and 64 values of each, enough to tell one checkpoint from another.

    Values count as rounded to bfloat16, so that a float32 checkpoint and its bfloat16 copy are one base. Weights are asked
    for one after the other: floats of a quantized one are made for it.
    """
    digest = hashlib.sha256()
    for name in sorted(set(names)):
        weight = weight_of(name)
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        if not weight.is_meta:
            step = max(1, weight.numel() // 64)
            digest.update(
                weight.detach().flatten()[::step][:64].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
            )
    return digest.hexdigest()
