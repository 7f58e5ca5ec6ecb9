"""Read JSON that a stranger may have written: bounded in size and depth, with every text a single line of bounded
length.

The meaning of each text is checked elsewhere, by the rule of its field. No text ever becomes a name (see
`graphpeft.names`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from graphpeft.errors import FileError

MOST_BYTES = 64 << 20
"""Largest size of a file: some 50,000 sites."""
LONGEST, LONGEST_FREE = 1_000, 4 << 20
"""Largest number of characters in a text, and in a free text: rules for every layer of a deep model take a megabyte."""


def read_json(path: Path, free: Collection[str] = ()) -> Any:
    """The content of a JSON file. Fields named in `free`, and all below them, may have long texts, quotes and
    backslashes.

    Raises `FileError` if the file cannot be read, is too large, is not JSON, nests too deeply, or has a text that is
    not plain.
    """
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise FileError(f"{path} has {size} bytes; a description has at most {MOST_BYTES}. It is another file.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(
            f"{path} is not readable JSON: {shortened(str(error))}. It was cut short or edited; copy the folder again."
        ) from error
    for where, text, loose in _texts(content, free):
        if not plain(text, loose):
            raise FileError(
                f"{path}: {where} holds {shortened(text)!r}, of {len(text)} characters. A text there must be one short line "
                f"without quotes. Usually the file was edited or damaged. Copy the folder again, from where you trust it."
            )
    return content


def plain(text: str, free: bool = False) -> bool:
    """Whether a text is one line of bounded length, without quotes and backslashes unless it is free."""
    one_line = text.replace("\t", " ").isprintable()
    return one_line and (len(text) <= LONGEST_FREE if free else len(text) <= LONGEST and not set(text) & set("\"'`\\"))


def shortened(text: str, most: int = 80) -> str:
    """The beginning of a text, for a message."""
    return text if len(text) <= most else f"{text[:most]}..."


def _texts(content: Any, free: Collection[str]) -> Iterator[tuple[str, str, bool]]:
    """Every text in a content, keys included: its top-level field, the text, and whether it is free."""
    waiting: list[tuple[str, Any, bool]] = [("the file", content, False)]
    while waiting:
        where, value, loose = waiting.pop()
        if isinstance(value, str):
            yield where, value, loose
        elif isinstance(value, list):
            waiting += [(where, each, loose) for each in value]
        elif isinstance(value, dict):
            for key, each in value.items():
                yield f"a name in {where}", key, loose
                waiting.append((shortened(key, 40) if not loose else where, each, loose or key in free))
