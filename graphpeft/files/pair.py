"""Write the two files of an adapter as one: at every moment a reader finds the old pair or the new one, both whole.

A new folder with both files is made beside the old one, and the two exchange names in one step. Where that cannot be done
(see `_movable`), the files are replaced in place, in an order in which `find` can tell at every moment which data belong
to the head: old data aside, new head, new data. Writers take turns by a lock.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from graphpeft.files import atomic
from graphpeft.files.atomic import ASIDE, flush, reported
from graphpeft.files.exchange import swap_dirs
from graphpeft.files.foreign import read_bytes
from graphpeft.files.staging import hold, staging_dir

MANY = 1000
"""A folder with more files than this is not made anew."""


@dataclass(frozen=True)
class Pair:
    """The names of two files: `head` describes what is in `data`."""

    head: str
    data: str
    belongs: Callable[[bytes, Path], bool]
    """Whether a head describes this file of data."""

    def write(self, folder: Path, head: bytes, data: bytes) -> None:
        """Replace both files, flushed to disk; other files of the folder stay.

        Raises `FileError` if that fails; the folder is then as it was.
        """
        with reported(folder):
            place = Path(os.path.realpath(folder))  # a link to a folder stays a link
            while not (self._made(place, head, data) or self._replaced(place, head, data)):
                pass  # meanwhile another process made the folder, or exchanged it

    def find(self, folder: Path) -> Path:
        """The file of data that belongs to the head; a kill may have left it under another name."""
        here, new, old = folder / self.data, self._new(folder), self._old(folder)
        if not new.is_file() and not old.is_file():
            return here
        with suppress(OSError):
            head = read_bytes(folder / self.head)
            for path in (here, new, old):
                if path.is_file() and self.belongs(head, path):
                    return path
        return old if old.is_file() and not here.exists() else here

    def _new(self, folder: Path) -> Path:
        return folder / f".{self.data}.new"

    def _old(self, folder: Path) -> Path:
        return folder / f".{self.data}.old"

    def _made(self, folder: Path, head: bytes, data: bytes) -> bool:
        """Make the folder, unless it exists."""
        if folder.exists():
            return False
        folder.parent.mkdir(parents=True, exist_ok=True)
        with staging_dir(folder) as fresh:
            self._fill(fresh, head, data)
            try:
                fresh.rename(folder)
            except OSError:
                if folder.is_dir():
                    return False
                raise
            flush(folder.parent)
        return True

    def _replaced(self, folder: Path, head: bytes, data: bytes) -> bool:
        """Replace the files of a folder, unless it was exchanged before this process had the lock."""
        with _locked(folder) as same:
            if not same:
                return False
            self._settle(folder)
            if not (_movable(folder) and self._exchanged(folder, head, data)):
                self._in_place(folder, head, data)
        return True

    def _exchanged(self, folder: Path, head: bytes, data: bytes) -> bool:
        """Make the folder anew, with the other files in it, and exchange the two. Returns false if the system cannot."""
        try:
            with staging_dir(folder) as fresh:
                for path in folder.iterdir():
                    if path.name not in (self.head, self.data):
                        os.link(path, fresh / path.name, follow_symlinks=False)
                self._fill(fresh, head, data)
                shutil.copystat(folder, fresh)
                flush(fresh)
                if _owner(fresh) != _owner(folder) or not swap_dirs(folder, fresh):
                    return False
                for path in fresh.iterdir():  # what another process wrote there in between
                    if not os.path.lexists(folder / path.name):
                        path.rename(folder / path.name)
                flush(folder.parent)
            return True
        except (OSError, NotImplementedError):  # the parent is write-protected, or the file system has no links
            return False

    def _fill(self, folder: Path, head: bytes, data: bytes) -> None:
        atomic.write(folder / self.data, data)
        atomic.write(folder / self.head, head)

    def _in_place(self, folder: Path, head: bytes, data: bytes) -> None:
        here = folder / self.data
        try:
            atomic.write(self._new(folder), data)
            if here.exists():
                # Until the new data come, other programs find none, rather than data of another head.
                here.replace(self._old(folder))
            atomic.write(folder / self.head, head)
        finally:
            self._settle(folder)

    def _settle(self, folder: Path) -> None:
        """Give the data that belong to the head their name, and delete the others."""
        found = self.find(folder)
        if found != folder / self.data:
            found.replace(folder / self.data)
        unfinished = (path for name in (self.head, self.data) for path in folder.glob(f".*{name}*{ASIDE}"))
        for left in (self._new(folder), self._old(folder), *unfinished):
            left.unlink(missing_ok=True)
        flush(folder)


def _movable(folder: Path) -> bool:
    """Whether a folder may be replaced by another of the same name.

    Folders inside of it, its mounts, and this process if it works in it would not come along.
    """
    with suppress(FileNotFoundError):  # this process works in a folder that was deleted
        here = Path.cwd()
        if folder in (here, *here.parents):
            return False
    if os.path.ismount(folder):
        return False
    found = list(folder.iterdir())
    return len(found) <= MANY and all(path.is_symlink() or path.is_file() for path in found)


def _owner(folder: Path) -> tuple[int, int]:
    about = folder.stat()
    return about.st_uid, about.st_gid


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Wait for the folder's lock. Yields false if the folder was exchanged meanwhile. Without locks, nobody waits."""
    handle = hold(folder, wait=True)
    try:
        yield handle is None or _same(handle, folder)
    finally:
        if handle is not None:
            os.close(handle)


def _same(handle: int, folder: Path) -> bool:
    try:
        there, held = folder.stat(), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino)
