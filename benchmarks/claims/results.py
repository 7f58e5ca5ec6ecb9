"""Where results are kept: one JSON file for each task of E1 to E3, one for E4, one for E5."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

FOLDER = Path(__file__).parent / "results"


def write(name: str, content: dict[str, Any], folder: Path = FOLDER) -> None:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    lines = [f"{json.dumps(key)}:{_lines(value)}" for key, value in ({"versions": versions} | content).items()]
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text("{" + ",\n".join(lines) + "}\n")


def read(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


def _lines(value: Any) -> str:
    """A list with one entry on a line, which git can compare."""
    if isinstance(value, list):
        return "[\n" + ",\n".join(json.dumps(_rounded(entry), separators=(",", ":")) for entry in value) + "]"
    return json.dumps(_rounded(value), separators=(",", ":"))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
