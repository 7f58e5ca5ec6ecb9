"""Write files so that a crash at any moment leaves the old file or the new one, never half of either."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from graphpeft.errors import FileError

ASIDE = ".unfinished"
"""Suffix of files and folders that have not got their name yet."""


class WriteError(FileError, OSError):
    """A file or folder could not be written. It is an `OSError` too, for callers who catch that."""


def write(path: Path, data: bytes, *, parents: bool = False) -> None:
    """Replace the file at `path` by `data`, flushed to disk. Raises `FileError` if that fails; the old file then stays."""
    aside = f".{path.name}.{os.getpid()}-{threading.get_ident()}{ASIDE}"
    with reported(path), writing(path, aside, parents=parents) as file:
        file.write(data)


@contextmanager
def writing(path: Path, aside: str | None = None, *, parents: bool = True) -> Iterator[BinaryIO]:
    """Open a file that gets its name only when it is complete and on disk. Until then it has the name `aside`."""
    if parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(aside or path.name + ASIDE)
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        flush(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def reported(place: Path) -> Iterator[None]:
    """Raise a `WriteError` that names the place for every error of the system."""
    try:
        yield
    except OSError as failure:
        # Of places inside of each other, the message names the outermost, which the user named.
        error = failure.__cause__ if isinstance(failure.__cause__, OSError) else failure
        failed = WriteError(
            f"{place} was not written: {error.strerror or error}. Usually the disk is full or write-protected, or a file or a "
            f"broken link is in the way. Make room, or name another place. What was there before is unchanged."
        )
        failed.errno = error.errno
        raise failed from error


def flush(path: Path) -> None:
    """Flush a finished file, or the names of the files in a folder, to disk, where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
