"""Read JSON that a stranger may have written: bounded in size and depth, with every text a single line of bounded
length.

The meaning of each text is checked elsewhere, by the rule of its field. No text ever becomes a name (see
`graphpeft.names`).
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from graphpeft.errors import FileError

MOST_BYTES = 64 << 20
"""Largest size of a file: some 50,000 sites."""
MOST_VALUES = 4_000_000
"""Largest number of values in a file: as many as 64 MiB of sites have, and few enough to be read in seconds."""
AGAIN = "Usually the folder was put together by hand, or damaged. Copy it again, from where you trust it."
LONGEST, LONGEST_FREE = 1_000, 4 << 20
"""Largest number of characters in a text, and in a free text: rules for every layer of a deep model take a megabyte."""


def read_json(path: Path, free: Collection[str] = ()) -> Any:
    """The content of a JSON file. Fields named in `free`, and all below them, may have long texts, quotes and
    backslashes.

    Raises `FileError` if the file cannot be read, is too large, is not JSON, nests too deeply, or has a text that is
    not plain.
    """
    return parse_json(path, read_description(path), free)


def read_description(path: Path) -> bytes:
    """The bytes of a JSON file. Raises `FileError` if it is no file, cannot be read, or is too large."""
    try:
        data = read_bytes(path, MOST_BYTES + 1)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}. {AGAIN}") from error
    if len(data) > MOST_BYTES:
        raise FileError(
            f"{path} has more than {MOST_BYTES} bytes, the most of a description. It is another file. {AGAIN}"
        )
    return data


def parse_json(path: Path, data: bytes, free: Collection[str] = ()) -> Any:
    """As `read_json`, for bytes that were read from `path`."""
    if sum(map(data.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise FileError(
            f"{path} has more than {MOST_VALUES} values, the most of a description. It is another file. {AGAIN}"
        )
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        why = "it nests too deeply" if isinstance(error, RecursionError) else shortened(str(error))
        raise FileError(
            f"{path} is not readable JSON: {why}. It was cut short or edited; copy the folder again."
        ) from error
    for where, text, loose in _texts(content, free):
        if not plain(text, loose):
            raise FileError(
                f"{path}: {where} holds {shortened(text)!r}, of {len(text)} characters. A text there must be one short line "
                f"without quotes. Usually the file was edited or damaged. Copy the folder again, from where you trust it."
            )
    return content


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """The content of a file, or its first `most` bytes. Raises `OSError` for what is no file, such as a pipe or a device,
    which could be endless or wait for ever."""
    with open_file(path) as file:
        # Files of /proc say that they are empty, or larger than any memory.
        try:
            return file.read(os.fstat(file.fileno()).st_size if most is None else most)
        except (MemoryError, OverflowError) as error:
            raise OSError(errno.EFBIG, "it is larger than the memory", str(path)) from error


def open_file(path: Path, buffering: int = -1) -> BinaryIO:
    """Open a file for reading. Raises `OSError` for what is no file, without waiting for it."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device"
            raise OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))
        return os.fdopen(handle, "rb", buffering)
    except BaseException:
        os.close(handle)
        raise


def plain(text: str, free: bool = False) -> bool:
    """Whether a text is one line of bounded length, without quotes and backslashes unless it is free."""
    one_line = text.replace("\t", " ").isprintable()
    return one_line and (len(text) <= LONGEST_FREE if free else len(text) <= LONGEST and not set(text) & set("\"'`\\"))


def shortened(text: str, most: int = 80) -> str:
    """The beginning of a text, for a message."""
    return text if len(text) <= most else f"{text[:most]}..."


LOOKED_INTO = (str, list, dict)


def _texts(content: Any, free: Collection[str]) -> Iterator[tuple[str, str, bool]]:
    """Every text in a content, keys included: its top-level field, the text, and whether it is free."""
    waiting: list[tuple[str, Any, bool]] = [("the file", content, False)]
    while waiting:
        where, value, loose = waiting.pop()
        if isinstance(value, str):
            yield where, value, loose
        elif isinstance(value, list):
            waiting += [(where, each, loose) for each in value if isinstance(each, LOOKED_INTO)]
        elif isinstance(value, dict):
            for key, each in value.items():
                yield f"a name in {where}", key, loose
                if isinstance(each, LOOKED_INTO):
                    waiting.append((shortened(key, 40) if not loose else where, each, loose or key in free))
