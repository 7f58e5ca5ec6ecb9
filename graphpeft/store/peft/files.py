"""The two files of a PEFT folder. PEFT itself has nothing that binds them, so the tensors' metadata name their config."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save
from torch import Tensor

from graphpeft.errors import FileError
from graphpeft.files.foreign import open_file, read_description
from graphpeft.files.pair import Pair
from graphpeft.store.peft.config import CONFIG, TENSORS, parse_config

DIGEST = "graphpeft.config_sha256"
"""Where the metadata of tensors that graphpeft wrote have the digest of their config. PEFT does not read it."""
TRIES, PAUSE = 5, 0.02
"""How often a folder is read again whose files do not fit, because another process may be writing it; and a pause in
seconds."""


def digest(head: bytes) -> str:
    return hashlib.sha256(head).hexdigest()


def packed(tensors: Mapping[str, Tensor], head: bytes) -> bytes:
    """A file of tensors that names its config; equal tensors give equal bytes."""
    told = {"format": "pt", DIGEST: digest(head)}
    data = save(dict(tensors), told)
    # safetensors writes metadata in any order.
    one, other = (
        json.dumps(dict(each), separators=(",", ":")).encode() for each in (told.items(), [*told.items()][::-1])
    )
    return data.replace(other, one, 1)


def _told(data: Path) -> str | None:
    """The digest of the config to which a file of tensors belongs; `None` if it has none."""
    with safetensors.safe_open(data, "pt") as file:
        return (file.metadata() or {}).get(DIGEST)


def _describes(head: bytes, data: Path) -> bool:
    try:
        return _told(data) == digest(head)
    except safetensors.SafetensorError:
        return False


PAIR = Pair(CONFIG, TENSORS, _describes)


def read_both(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors, from one moment. Raises `FileError` if one of them cannot be read."""
    head, tried, config = b"", 0, {}
    while True:
        before, head = head, read_description(folder / CONFIG)
        if head != before:
            config, tried = parse_config(folder / CONFIG, head), 0
        try:
            told, tensors = _load(folder)
        except FileError:
            if tried == TRIES:
                raise
        else:
            # Who edits a config by hand leaves tensors that name another one, so in the end they are taken.
            fits = told in (None, digest(head))
            if (fits or tried == TRIES) and read_description(folder / CONFIG) == head:
                return config, tensors
        time.sleep(PAUSE)
        tried += 1


def _load(folder: Path) -> tuple[str | None, dict[str, Tensor]]:
    """The digest of the tensors' config, if they have one, and the tensors."""
    try:
        path = PAIR.find(folder)
        open_file(path).close()
        return _told(path), load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        pickled = " Pickles are not read: load it with PEFT and save it again, which writes safetensors." * any(
            folder.glob("adapter_model.bin")
        )
        raise FileError(f"{folder / TENSORS} cannot be read: {error}.{pickled}") from error
