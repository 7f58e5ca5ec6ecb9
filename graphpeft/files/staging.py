"""A locked staging folder beside the target; stale ones of killed processes are recognized and deleted."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from graphpeft.files.atomic import ASIDE

try:
    import fcntl
except ImportError:  # Windows opens no folders: without locks, no stale folder is deleted
    fcntl = None  # type: ignore[assignment]


@contextmanager
def staging_dir(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, deleted on exit if it still exists. Those of killed processes are deleted first."""
    _sweep(target)
    fresh, held = _made(target)
    try:
        yield fresh
    finally:
        try:
            shutil.rmtree(fresh, ignore_errors=True)
        finally:
            if held is not None:
                os.close(held)


def _made(target: Path) -> tuple[Path, int | None]:
    while True:
        fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{ASIDE}")
        fresh.mkdir()
        held = hold(fresh, wait=True)
        if fresh.exists():  # otherwise another process deleted it as stale
            return fresh, held
        if held is not None:
            os.close(held)


def _sweep(target: Path) -> None:
    ours = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}{re.escape(ASIDE)}")
    for path in target.parent.iterdir():
        if ours.fullmatch(path.name) and (held := hold(path, wait=False)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(held)


def hold(folder: Path, wait: bool) -> int | None:
    """Lock the folder until the process ends; `None` if another process has the lock, or locks do not exist."""
    with suppress(OSError):
        if fcntl is not None:
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except OSError:
                os.close(handle)
            else:
                return handle
    return None
