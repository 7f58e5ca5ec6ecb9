"""`python -m graphpeft.generate`: write everything that follows from what modules register. pre-commit runs it; a test compares.

It writes `registered.json` (passes, methods, targets, for help and completion), the methods in `__init__.pyi`, and the tables
of methods in README.md and docs/methods.md.
"""

from __future__ import annotations

import json
import pkgutil
import sys
from dataclasses import astuple
from importlib import import_module
from pathlib import Path

import graphpeft
from graphpeft.match import registry
from graphpeft.methods import builtin
from graphpeft.tracing import PASSES

PACKAGE = Path(str(graphpeft.__file__)).parent
ROOT = PACKAGE.parent
STUB_BEGIN, STUB_END = "# -- generated: the methods, one a file", "# -- end of generated"
BEGIN, END = "<!-- generated: methods -->", "<!-- end of generated -->"
SKIPPED = ("graphpeft.generate", "graphpeft.demo", "graphpeft.cli")
"""Modules that register nothing, and of which some need packages that are installed on request."""


def generated() -> dict[Path, str]:
    """Every file with generated text, and what it should hold."""
    for module in pkgutil.walk_packages(graphpeft.__path__, "graphpeft."):
        if not module.name.startswith(SKIPPED):
            import_module(module.name)
    texts = {PACKAGE / "registered.json": _registered(), PACKAGE / "__init__.pyi": _stub()}
    for path, columns in ((ROOT / "README.md", 3), (ROOT / "docs" / "methods.md", 5)):
        if path.is_file():  # not beside an installed package
            texts[path] = _between(path.read_text(encoding="utf-8"), _table(columns), BEGIN, END)
    return texts


def _registered() -> str:
    targets = sorted({*registry.roles(), *registry.ALIASES, "qv", "qkv", "qkvo"})
    found = {"passes": dict(sorted(PASSES.items())), "methods": [m.name for m in builtin()], "targets": targets}
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def _stub() -> str:
    lines = [f"from .methods.{m.__module__.rpartition('.')[2]} import {m.__name__} as {m.__name__}" for m in builtin()]
    return _between((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"), "\n".join(lines), STUB_BEGIN, STUB_END)


def _table(columns: int) -> str:
    """The first columns of what methods say of themselves."""
    head = ("method", "ΔW (* frozen)", "trained per site", "at the start", "as plain LoRA")
    rows = [(f"`{m.name}`", *astuple(m.summary)) for m in builtin()]
    lines = [f"| {' | '.join(row[:columns])} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * columns + "|", *lines[1:]])


def _between(text: str, made: str, begin: str, end: str) -> str:
    before, _, rest = text.partition(begin)
    assert end in rest, f"there is no {begin} with its {end}"
    return f"{before}{begin}\n{made}\n{end}{rest.partition(end)[2]}"


def main() -> int:
    """Write what differs; return 1 if anything did, as pre-commit expects."""
    texts = generated()
    changed = [path for path, text in texts.items() if not path.is_file() or path.read_text("utf-8") != text]
    for path in changed:
        path.write_text(texts[path], encoding="utf-8")
        print(f"written: {path.relative_to(ROOT)}")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main())
