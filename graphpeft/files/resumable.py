"""A folder that is complete or absent: it is written beside its place, survives a kill, and is renamed when it is done.

Beside `out` are `out.part`, the files so far, and `out.part.json`, a note of their sources, which is written first and
deleted last. Each file is written under another name, flushed to disk and renamed, so every file under its own name is
complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from graphpeft.errors import FileError
from graphpeft.files.atomic import ASIDE, flush, writing


def begin(out: Path, sources: Mapping[str, str]) -> Path | None:
    """The folder to write to, which may hold finished files; `None` if only the note of an earlier run was left to
    delete.

    `sources` says what the result is made from; a killed run continues only with the same sources. Raises `FileError`
    if `out` is not empty, or if an earlier run had other sources.
    """
    part, note = _part(out), _note(out)
    noted = _noted(part, note)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if noted == sources and not part.exists():
            note.unlink()
            return None
        raise FileError(f"{out} exists already, and nothing is written over. Name a new folder, or delete that one.")
    if noted is None:
        with writing(note) as file:
            file.write(json.dumps(sources, indent=1).encode())
    elif noted != sources:
        other = ", ".join(name for name in sources if noted.get(name) != sources[name]) or "something else"
        raise FileError(
            f"{part} is what a run left when it was interrupted, and that run had another {other}. Finish it with the same "
            f"inputs, or delete it and {note.name}."
        )
    part.mkdir(exist_ok=True)
    for left in part.rglob(f"*{ASIDE}"):
        left.unlink()
    return part


def finish(out: Path) -> None:
    """Move the finished folder to its place."""
    part = _part(out)
    for folder in (part, *(path for path in part.rglob("*") if path.is_dir())):
        flush(folder)
    if out.exists():
        out.rmdir()
    part.rename(out)
    flush(out.parent)
    _note(out).unlink()


def discard(out: Path) -> None:
    """Delete an unfinished folder."""
    shutil.rmtree(_part(out), ignore_errors=True)
    _note(out).unlink(missing_ok=True)


@contextmanager
def background_writer(file: BinaryIO) -> Iterator[Callable[[bytes | memoryview], None]]:
    """Write to a file in a background thread, while the caller makes the next piece."""
    last: list[Future[int]] = []

    def settle() -> None:
        while last:
            last.pop().result()

    def write(data: bytes | memoryview) -> None:
        settle()
        last.append(pool.submit(file.write, data))

    with ThreadPoolExecutor(1) as pool:
        yield write
        settle()


def _part(out: Path) -> Path:
    return out.with_name(f"{out.name}.part")


def _note(out: Path) -> Path:
    return out.with_name(f"{out.name}.part.json")


def _noted(part: Path, note: Path) -> dict[str, str] | None:
    """The sources of an earlier run; `None` if there was none."""
    try:
        return {str(name): str(value) for name, value in json.loads(note.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        if not part.exists():
            return None
        found: Path = part
    except (OSError, ValueError, AttributeError, RecursionError):
        found = note
    raise FileError(f"{found} is in the way: no merge left it there. Move it, or name another folder to write to.")
