"""A folder that is whole or not there: it is written beside its place, survives a kill, and is renamed when it is done.

Beside `out` stands `out.part` with the files so far, in a folder of their own, and a note of what they are made from. A
file is written under another name, flushed to the disk and renamed, so that whatever has its own name is finished.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from graphpeft.errors import FileError
from graphpeft.store.files import write

NOTE, FILES = "merge.json", "files"
ASIDE = ".unfinished"


def begin(out: Path, sources: Mapping[str, str]) -> Path | None:
    """The folder to write to, perhaps with finished files in it; `None` if an earlier run did all but tidy up.

    `sources` says what the result is made from; a run that was killed goes on only from the same.
    Raises `FileError` if `out` holds something, or the earlier run was one of something else.
    """
    part = _part(out)
    noted = _noted(part)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if noted == sources and not (part / FILES).exists():
            shutil.rmtree(part)
            return None
        raise FileError(f"{out} exists already, and nothing is written over. Name a new folder, or delete that one.")
    if noted is not None and noted != sources:
        other = ", ".join(name for name in sources if noted.get(name) != sources[name]) or "something else"
        raise FileError(
            f"{part} is what a run left that was stopped, and that run had another {other}. Finish it with what it was "
            f"started with, or delete {part}."
        )
    folder = part / FILES
    if noted is None:
        folder.mkdir(parents=True)
        write(part / NOTE, json.dumps(sources, indent=1).encode())
    for left in folder.rglob(f"*{ASIDE}"):
        left.unlink()
    return folder


def finish(out: Path) -> None:
    """Put the finished folder in its place."""
    part = _part(out)
    for folder in [part / FILES, *(path for path in (part / FILES).rglob("*") if path.is_dir())]:
        _flush(folder)
    if out.exists():
        out.rmdir()
    (part / FILES).rename(out)
    _flush(out.parent)
    shutil.rmtree(part)


def discard(out: Path) -> None:
    """Delete an unfinished folder."""
    shutil.rmtree(_part(out), ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when it is whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ASIDE)
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _part(out: Path) -> Path:
    return out.with_name(f"{out.name}.part")


def _noted(part: Path) -> dict[str, str] | None:
    """What the files of an earlier run are made from; `None` if it did not come to write any."""
    if not part.exists():
        return None
    try:
        noted = json.loads((part / NOTE).read_text(encoding="utf-8"))
        return {str(name): str(value) for name, value in noted.items()}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, AttributeError) as error:
        raise _foreign(part) from error
    # Killed before its note was written, a run leaves an empty folder, and perhaps the note under its other name.
    if any(path.is_file() and not path.name.startswith(f".{NOTE}") for path in part.rglob("*")):
        raise _foreign(part)
    shutil.rmtree(part)
    return None


def _foreign(part: Path) -> FileError:
    return FileError(
        f"{part} is in the way: it is not what a merge leaves. Move it, or name another folder to write to."
    )


def _flush(folder: Path) -> None:
    """Names of files to the disk, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
