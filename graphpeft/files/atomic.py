"""Write files so that a crash at any moment leaves the old file or the new one, never half of either."""

from __future__ import annotations

import os
from pathlib import Path


def write(path: Path, data: bytes, *, parents: bool = False) -> None:
    """Replace the file at `path` by `data`: write a file beside it, flush it to disk, then rename it."""
    if parents:  # the folder may be new
        path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
