"""Diagnose an exported folder and its adapters: run each check of a session separately, and report every outcome."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import onnxruntime as ort

from graphpeft.errors import AdapterError, FileError
from graphpeft.runtime.adapter_file import read
from graphpeft.runtime.folder import oldest_runtime, recover
from graphpeft.runtime.layout import b_of
from graphpeft.runtime.own_files import REPORT
from graphpeft.runtime.session import Session


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    about: str
    good: bool
    text: str


def doctor(folder: str | Path, adapter: str | Path | None = None) -> list[Finding]:
    """Check a folder that `export` wrote, and its adapters or the one file `adapter`.

    Raises `FileError` if the folder does not exist.
    """
    folder = recover(Path(folder))
    if not folder.is_dir():
        raise FileError(f"{folder}: there is no such folder. Pass a folder that export() wrote.")
    try:
        session = Session(folder, adapters=False)
    except FileError as error:
        return [Finding("graph", False, f"{error}{_tried(folder)}")]
    report = []
    try:
        oldest_runtime(folder)
    except FileError as error:
        report = [Finding(REPORT, False, str(error))]
    files = [Path(adapter)] if adapter is not None else session.files
    return [*_graphs(session), *report, *(one for file in files for one in _adapter(session, file))]


def _graphs(session: Session) -> Iterator[Finding]:
    for name, graph in session.graphs.items():
        sites = sum(len(slot.sites) for slot in graph.slots)
        open_for = (
            f"open for adapters at {sites} sites, {len(graph.slots)} slots" if sites else "with adapters folded in"
        )
        tried = f"; tried with ONNX Runtime {graph.oldest} and later, here {ort.__version__}" if graph.oldest else ""
        yield Finding(f"{name}.onnx", True, f"loads; base {graph.base[:12]}; {open_for}{tried}")


def _tried(folder: Path) -> str:
    try:
        oldest = oldest_runtime(folder)
    except FileError:
        return ""
    return f" It was tried with ONNX Runtime {oldest} and later; here is {ort.__version__}." if oldest else ""


def _adapter(session: Session, file: Path) -> Iterator[Finding]:
    about = file.name
    if (file / "adapter_config.json").is_file():
        yield Finding(about, False, "a PEFT folder. Load it onto the model and export, or convert it with olive.")
        return
    try:
        name = session.add(file)
    except (FileError, AdapterError) as error:
        yield Finding(about, False, str(error))
        try:  # does the file fit apart from its base model?
            name = session.add(file, any_base=True)
        except (FileError, AdapterError) as second:
            if str(second) != str(error):
                yield Finding(about, False, str(second))
            if near := _near(session, file):
                yield Finding(about, False, near)
            return
    tensors = {key: value for loaded in session.loaded(name).values() for key, value in loaded.tensors.items()}
    sites = [site for graph in session.graphs.values() for slot in graph.slots for site in slot.sites]
    reached = sum(any(site in loaded.pairs for loaded in session.loaded(name).values()) for site in sites) or len(
        tensors
    )
    size = sum(value.nbytes for value in tensors.values())
    yield Finding(about, True, f"fits: {reached} of {len(sites)} sites, {size / 1024:.1f} KiB")
    if still := [key for key, value in tensors.items() if key.endswith(".lora_B.weight") and not np.any(value)]:
        yield Finding(about, False, f"{still[0]} is zero, as before training: the adapter does nothing there.")


def _near(session: Session, file: Path) -> str:
    """A hint about the graph name closest to an unknown tensor name, such as one with an extra `.default`."""
    try:
        names = list(read(file))
    except FileError:
        return ""
    known = {name for graph in session.graphs.values() for name in (*graph.open, *map(b_of, _sites(session)))}
    strange = next((name for name in names if name not in known and "lora_A" not in name), None)
    close = get_close_matches(strange, sorted(known), 1, 0.6) if strange else []
    return f"closest to {strange!r} is {close[0]!r}: rename the tensors, or export the adapter anew." if close else ""


def _sites(session: Session) -> Iterator[str]:
    for graph in session.graphs.values():
        for slot in graph.slots:
            yield from slot.sites
