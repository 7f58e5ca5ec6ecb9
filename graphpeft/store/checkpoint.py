"""A safetensors checkpoint on disk: which file holds each tensor, and at which bytes. Opening it reads only the headers.

A file has 8 bytes with the length of the header, the header in JSON, and the tensors, one after another without gaps.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graphpeft.errors import FileError
from graphpeft.files.foreign import open_file, read_json
from graphpeft.store.fingerprint import VERSION, looked_at

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Stored dtypes to which an update can be added."""
LONGEST = 100_000_000
"""The longest header, in bytes, that safetensors itself accepts."""


@dataclass(frozen=True)
class Stored:
    """A stored tensor: safetensors' name of its dtype, its shape, and its byte range `begin` to `end` in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Shard:
    """One file; `tensors` are sorted by their position in it."""

    path: Path
    size: int
    header: bytes
    """Everything before the first tensor."""
    tensors: Mapping[str, Stored]

    def tensor(self, name: str) -> torch.Tensor:
        """A floating-point tensor, memory-mapped copy-on-write: pages are read on access, and the file is never written."""
        place = self.tensors[name]
        size = place.end - place.begin
        data = np.memmap(self.path, np.uint8, "c", place.begin, (size,)) if size else np.empty(0, np.uint8)
        return torch.from_numpy(data).view(FLOATS[place.dtype]).view(place.shape)

    def glimpse(self, name: str, version: int = VERSION) -> torch.Tensor:
        """A tensor with only the values that `fingerprint` reads; all others are zero and take no memory.

        They are read run by run, after `posix_fadvise` announced all of them, so the reads overlap. In a mapped
        tensor each access would wait for the disk in turn and read whole pages around the value.
        """
        place = self.tensors[name]
        dtype, count = FLOATS[place.dtype], prod(place.shape)
        thin = torch.frombuffer(mmap.mmap(-1, max(1, place.end - place.begin)), dtype=dtype, count=count)
        runs = [(begin, length) for begin, length in looked_at(count, version) if length]
        wide = dtype.itemsize
        with open_file(self.path, buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                for begin, length in runs:
                    os.posix_fadvise(file.fileno(), place.begin + begin * wide, length * wide, os.POSIX_FADV_WILLNEED)
            for begin, length in runs:
                file.seek(place.begin + begin * wide)
                thin[begin : begin + length] = torch.frombuffer(bytearray(file.read(length * wide)), dtype=dtype)
        return thin.view(place.shape)


@dataclass(frozen=True)
class Checkpoint:
    """All files of a checkpoint, and the file that holds each tensor."""

    folder: Path
    shards: tuple[Shard, ...]
    where: Mapping[str, Shard]

    def digest(self) -> str:
        """A hash of the files' names, sizes, modification times and headers; it does not read the weights."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.path.name} {shard.size} {shard.path.stat().st_mtime_ns}\n".encode() + shard.header)
        return digest.hexdigest()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder that `save_pretrained` wrote, with one file or shards.

    Raises `FileError` for a folder without safetensors, a missing or truncated file, or an index that does not match.
    """
    index = {} if (folder / WHOLE).is_file() else _index(folder)
    shards = tuple(_shard(folder / name) for name in sorted({*index.values()} or {WHOLE}))
    where = {key: shard for shard in shards for key in shard.tensors}
    astray = sorted(key for key, name in index.items() if key not in where or where[key].path.name != name)
    if astray:
        raise FileError(
            f"{folder / INDEX} says that {index[astray[0]]} holds {astray[0]}, but it does not. Usually files of two "
            f"checkpoints were mixed; copy the whole folder again."
        )
    return Checkpoint(folder, shards, where)


def _index(folder: Path) -> dict[str, str]:
    """Each tensor's file name, from the index."""
    path = folder / INDEX
    if not path.is_file():
        raise FileError(
            f"{folder} holds neither {WHOLE} nor {INDEX}. Pass a folder that save_pretrained wrote; to convert weights in "
            f"another format, call from_pretrained(...).save_pretrained(...)."
        )
    try:
        found = read_json(path, free={"weight_map"})["weight_map"]
        index = {str(key): str(name) for key, name in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{path} is not a checkpoint's index: {error!r}. Copy the folder again.") from error
    outside = [name for name in index.values() if Path(name).name != name or "\0" in name]
    if outside or not index:
        raise FileError(f"{path} names {outside[:1] or 'no file'}, where files of the folder itself are expected.")
    return index


def _shard(path: Path) -> Shard:
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else LONGEST + 1
            text = file.read(length) if length <= LONGEST else b""
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}. Every file of a checkpoint is needed.") from error
    try:
        tensors = _places(json.loads(text), 8 + len(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise _broken(path, "its header is not a safetensors header") from error
    ends = [8 + len(text), *(place.end for place in tensors.values())]
    if any(place.begin != end for place, end in zip(tensors.values(), ends, strict=False)):
        raise _broken(path, "its tensors overlap or leave gaps")
    if ends[-1] != size:
        raise _broken(path, f"it has {size:,} bytes, but its header describes {ends[-1]:,}")
    return Shard(path, size, prefix + text, tensors)


def _places(header: dict[str, Any], start: int) -> dict[str, Stored]:
    found = {}
    for name, about in header.items():
        if name != "__metadata__":
            begin, end = about["data_offsets"]
            if type(begin) is not int or type(end) is not int:
                raise TypeError(name)
            found[name] = Stored(str(about["dtype"]), tuple(map(int, about["shape"])), start + begin, start + end)
            width = FLOATS[found[name].dtype].itemsize if found[name].dtype in FLOATS else None
            if width is not None and end - begin != prod(found[name].shape) * width:
                raise ValueError(name)
    return dict(sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)))


def _broken(path: Path, why: str) -> FileError:
    return FileError(f"{path} is damaged: {why}. Usually a copy or download was cut short; copy the file again.")
