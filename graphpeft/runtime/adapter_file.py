"""ONNX Runtime's `.onnx_adapter` files: named tensors and two version numbers, which ONNX Runtime does not check."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from graphpeft.errors import FileError
from graphpeft.runtime.layout import Arrays

SCHEMA = 2
"""Version of the contract between graph, adapter files and sidecars."""
SUFFIX = ".onnx_adapter"


def write(path: Path, tensors: Arrays, base: str) -> None:
    """Write tensors for the base model with the hex fingerprint `base`, whose first 31 bits go into the file.

    Raises `FileError` if the file cannot be written.
    """
    file = ort.AdapterFormat()
    file.set_adapter_version(SCHEMA)
    file.set_model_version(int(base[:8], 16) >> 1)  # a signed 32-bit field
    file.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(tensor) for name, tensor in tensors.items()})
    try:
        file.export_adapter(str(path))
    except RuntimeError as error:
        raise FileError(f"{path}: the adapter could not be written ({error}). Usually the disk is full.") from error


def read(path: Path) -> Arrays:
    """Read a file's tensors. Raises `FileError` if it is missing, truncated, or not an adapter."""
    if not path.is_file():
        raise FileError(f"{path}: there is no such file. Copy all files of the adapter, one for each graph.")
    try:
        file = ort.AdapterFormat.read_adapter(str(path))
        # Copy the values: they point into memory that is freed with the file object.
        return {name: value.numpy().copy() for name, value in file.get_parameters().items()}
    except (RuntimeError, ValueError, MemoryError) as error:
        raise FileError(f"{path}: not an adapter of ONNX Runtime ({error}). Export the adapter again.") from error
