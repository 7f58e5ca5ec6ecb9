"""`python -m graphpeft.generate`: write everything that follows from what modules register. pre-commit runs it; a test compares.

It writes `registered.json` (passes, methods, targets, for help and completion), the methods in `__init__.pyi`, and the tables
of methods in README.md and docs/methods.md.
"""

from __future__ import annotations

import json
import pkgutil
import re
import sys
from collections import Counter
from dataclasses import astuple
from importlib import import_module
from pathlib import Path

import graphpeft
from graphpeft.match import registry
from graphpeft.match.roles import DECLARED
from graphpeft.methods import builtin
from graphpeft.tracing import PASS_MODULES, PASSES

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
    passes = {name: PASSES[name] for name in sorted(PASSES) if PASS_MODULES[name].startswith("graphpeft.")}
    roles = (role for declaration in DECLARED for role in declaration.roles)
    targets = sorted({*roles, *registry.ALIASES, *registry.ALIASES["experts"], "qv", "qkv", "qkvo"})
    found = {"passes": passes, "methods": [m.name for m in builtin()], "targets": targets}
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def _stub() -> str:
    lines = [f"from .methods.{m.__module__.rpartition('.')[2]} import {m.__name__} as {m.__name__}" for m in builtin()]
    text = _between((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"), "\n".join(lines), STUB_BEGIN, STUB_END)
    twice = [name for name, count in Counter(re.findall(r" as (\w+)$", text, re.M)).items() if count > 1]
    if twice:
        raise SystemExit(
            f"{', '.join(twice)}: two things have this public name. Give the class of the method another one."
        )
    return text


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
