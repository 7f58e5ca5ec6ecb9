"""The page on looking inside shows what is printed today."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
spec = importlib.util.spec_from_file_location("inspect_examples", DOCS / "inspect_examples.py")
assert spec is not None
assert spec.loader is not None
examples = importlib.util.module_from_spec(spec)
spec.loader.exec_module(examples)
EXAMPLE = re.compile(r"<!-- example: ([\w ]+) -->\n```text\n(.*?)```\n", re.S)
SHOWN = dict(EXAMPLE.findall(examples.PAGE.read_text(encoding="utf-8")))


def test_every_example_is_on_the_page() -> None:
    assert set(SHOWN) == set(examples.EXAMPLES)


SLOW = {"diff of exports"}
"""It exports twice, as `test_diff.py` does."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in SHOWN])
def test_an_example_is_what_is_printed(name: str) -> None:
    """But for seconds, what depends on rounding, and what changes with the version of transformers: lines and their numbers."""
    told = [plain(text) for text in (SHOWN[name], str(examples.EXAMPLES[name]()))]
    assert told[0] == told[1]


def plain(text: str) -> list[str]:
    text = re.sub(r"(\.py:\d+|\d+\.\d+)( .*self.*| .*code.*)?", "#", text)
    return [" ".join(line.split()) for line in text.strip().splitlines() if not line.startswith("      ")]
