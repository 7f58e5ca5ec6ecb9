"""Shell completion. It runs at every tab, so nothing here imports torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from glob import escape, glob
from importlib.util import find_spec
from pathlib import Path

import typer

from graphpeft import registered


def models(incomplete: str) -> list[str]:
    """Complete a model: model types of transformers, and paths."""
    return [*_starting(_types(), incomplete), *paths(incomplete)]


def paths(incomplete: str) -> list[str]:
    found = (Path(name) for name in sorted(glob(f"{escape(incomplete)}*")))
    return [f"{path}/" if path.is_dir() else str(path) for path in found]


def rules(incomplete: str) -> list[str]:
    """Complete the last rule: its target, or after a colon its method."""
    before, target, colon, method = _split(incomplete)
    if colon:
        return [f"{before}{target}:{name}" for name in _starting(registered.methods(), method)]
    return [f"{before}{name}" for name in _starting((*registered.targets(), "path("), target)]


def _split(text: str) -> tuple[str, str, str, str]:
    place = text.rfind(";") + 1
    place += len(text[place:]) - len(text[place:].lstrip())
    return text[:place], *text[place:].partition(":")


def passes(incomplete: str) -> list[tuple[str, str]]:
    """Complete pass names, with their descriptions."""
    return [item for item in registered.passes().items() if item[0].startswith(incomplete)] + [
        ("all", "every pass")
    ] * ("all".startswith(incomplete))


def adapters(ctx: typer.Context, incomplete: str) -> list[str]:
    """Complete adapters of the exported folder given earlier on the command line."""
    # An option without its value stops the parser; the arguments before it are then in `args`.
    folder = Path(str(ctx.params.get("folder") or next(iter(ctx.args), ".")))
    return _starting(sorted({file.name.partition(".")[0] for file in folder.glob("*.onnx_adapter")}), incomplete)


def _types() -> list[str]:
    """Model types, parsed from the text of transformers' own table, because importing it would import torch."""
    package = find_spec("transformers")
    folder = Path(next(iter(package.submodule_search_locations or ()), "")) if package else Path()
    tables = [folder / "models" / "auto" / name for name in ("auto_mappings.py", "configuration_auto.py")]
    text = "\n".join(table.read_text(encoding="utf-8") for table in tables if table.is_file())
    return sorted(set(re.findall(r'(?:[({]|^ *)"([\w.-]+)"[,:] "\w+Config"', text, re.M)))


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
