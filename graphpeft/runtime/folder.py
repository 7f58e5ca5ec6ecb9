"""The folder that an export writes: it appears complete or not at all, with a report of the checks.

An export is written into a hidden staging folder beside the target and flushed to disk. Then the two folders swap names,
in one atomic system call where there is one (`swap_dirs`). Elsewhere two renames stand in for it: target to `.NAME.old`,
staging to target. A kill between them leaves no target, so `recover` renames `.NAME.old` back before anything is read.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from graphpeft.errors import ExportError, FileError
from graphpeft.files.atomic import flush, write
from graphpeft.files.exchange import swap_dirs
from graphpeft.files.foreign import read_json
from graphpeft.files.staging import staging_dir
from graphpeft.runtime.own_files import REPORT, is_ours

REMEDY = "Export to a new folder, or move what is there."


@dataclass(frozen=True)
class Check:
    """One figure of the verification, and its limit."""

    test: str
    """`numbers`, `swap`, `slots`, `rows` (differences from PyTorch), `effect` (distance from the base model), or
    `quantized` (difference of a quantized graph, as users run it, from the same rounded weights in float)."""
    subject: str
    value: float
    limit: float
    least: bool = False
    """Whether the limit is a lower bound (effects) rather than an upper one (differences)."""


@dataclass(frozen=True)
class ExportReport:
    """The files of an export and the figures of its checks; prints as a table and is saved as `graphpeft.json`."""

    path: str
    mode: str
    """`swappable` or `merged`."""
    adapters: tuple[str, ...]
    slots: int
    opset: int
    verify: str
    files: Mapping[str, int]
    """Bytes of each file, except this report."""
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    versions: Mapping[str, str]
    seconds: float
    onnxruntime: str = ""
    """The oldest ONNX Runtime that ran exports of this opset in tests."""
    passes: tuple[str, ...] = ()
    """The passes over the translated graph, in order; every slot was checked after each."""

    def save(self, folder: Path) -> None:
        """Write the report into the folder, without this machine's path."""
        fields = {name: value for name, value in asdict(self).items() if name != "path"}
        write(folder / REPORT, (json.dumps(fields, indent=1) + "\n").encode())

    def __rich__(self) -> Group:
        size = sum(self.files.values()) / 2**20
        table = Table(box=None, pad_edge=False)
        for column in ("check", "subject", "figure", "limit"):
            table.add_column(column)
        for check in self.checks:
            limit = f"{'>=' if check.least else '<='} {check.limit:.1e}"
            table.add_row(check.test, check.subject, f"{check.value:.1e}", limit)
        head = f"{self.path}: {self.mode}, opset {self.opset}, {self.slots} slots, {size:.1f} MiB, {self.seconds:.1f} s"
        head += f"; tried with ONNX Runtime {self.onnxruntime} and later" if self.onnxruntime else ""
        names = "adapters: " + (", ".join(self.adapters) or "none")
        names += "\ngraph passes: " + " → ".join(self.passes) if self.passes else ""
        body = table if self.checks else Text('not verified: verify="off"')
        return Group(Text(head), Text(names), body, *(Text(f"note: {note}") for note in self.notes))

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def oldest_runtime(folder: Path) -> str:
    """The `onnxruntime` field of a folder's report, "" if it has none. Raises `FileError` for an invalid report."""
    path = folder / REPORT
    told = read_json(path, free={"checks", "notes"}) if path.is_file() else {}
    found = told.get("onnxruntime", "") if isinstance(told, dict) else None
    if not isinstance(found, str) or not re.fullmatch(r"(\d[\w.+!-]{0,99})?", found):
        raise FileError(f"{path} is not an export's report. Usually it was edited or damaged. Copy the folder again.")
    return found


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file of a folder."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target` that replaces it at the end, or is deleted on an error.

    The folder is flushed to disk before it replaces the target. A kill at any moment leaves either the old or the new
    folder; the other one may stay beside it under a hidden name, and the next export to this target deletes it.

    An existing target is replaced as a whole, if it is empty or an earlier export with no other files.

    Raises:
        ExportError: the target holds something that no export wrote.
    """
    target = recover(target.resolve())  # resolve symbolic links, so that the folder is replaced and not the link
    if target in (here := Path.cwd(), *here.parents):
        raise ExportError(
            f"{target} contains this process's working directory, and an export replaces its folder. Name a folder inside of it."
        )
    _refuse_foreign(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with staging_dir(target) as fresh:
            yield fresh
            for path in (*fresh.rglob("*"), fresh):
                flush(path)
            _refuse_foreign(target)
            known = {path.name for path in target.iterdir()} if target.exists() else set()
            _replace(target, fresh, known)
    except OSError as error:
        raise ExportError(
            f"{target}: nothing was written: {error}. Usually the disk is full or write-protected."
        ) from error


def _replace(target: Path, fresh: Path, known: set[str]) -> None:
    """Give `fresh` the name of the target, whose files are `known`; others that came meanwhile move along."""
    if not target.exists():
        fresh.rename(target)
    elif swap_dirs(target, fresh):
        _rescue(fresh, target, known)
    else:
        old = _old(target)
        _refuse_foreign(old)
        _delete(old)  # left by an export that was killed just before deleting it
        target.rename(old)
        try:
            fresh.rename(target)
        except OSError:
            old.rename(target)
            raise
        _rescue(old, target, known)
        _delete(old)
    flush(target.parent)


def _delete(folder: Path) -> None:
    """Delete an export, its report last: what a kill leaves is still recognized."""
    for path in folder.iterdir() if folder.exists() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != REPORT:
            path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _rescue(old: Path, target: Path, known: set[str]) -> None:
    """Move what another process put into the old folder in the last moment into the new one."""
    for path in old.iterdir():
        if path.name not in known and not os.path.lexists(target / path.name):
            path.rename(target / path.name)


def recover(target: Path) -> Path:
    """If a kill between the two renames of `_replace` left no target, rename the old folder back; returns `target`."""
    if target.name and not target.exists() and _old(target).is_dir():
        _old(target).rename(target)
    return target


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _refuse_foreign(target: Path) -> None:
    """Raise unless an export can have written everything that is in the place."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ExportError(f"{target}: this is a file; an export is a folder. {REMEDY}")
    if not any(target.iterdir()):
        return
    try:
        told = read_json(target / REPORT, free={"checks", "notes"})
        listed, adapters = told["files"], told.get("adapters", [])
        if not all(Path(name).name == name and type(size) is int for name, size in listed.items()):
            raise TypeError(listed)
        if not all(re.fullmatch(r"\w{1,200}", name) for name in adapters):
            raise TypeError(adapters)
    except (FileError, KeyError, TypeError, AttributeError):
        raise ExportError(f"{target}: the folder exists, and graphpeft's export did not write it. {REMEDY}") from None
    for path in sorted(target.iterdir()):
        if not (path.name in {REPORT, *listed} and is_ours(path, adapters)):
            raise ExportError(
                f"{target}: an earlier export, but {path.name!r} is not part of it and would be lost. {REMEDY}"
            )
