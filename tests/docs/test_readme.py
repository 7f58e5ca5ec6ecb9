"""The README's code is the example's code, and it runs; its test command is the one that CI takes out of it."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_readme_shows_the_quickstart() -> None:
    code = (ROOT / "examples/quickstart.py").read_text().split('"""', 2)[2].strip()
    assert f"```python\n{code}\n```" in (ROOT / "README.md").read_text()


def test_the_quickstart_runs_and_leaves_the_base_model(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples/quickstart.py"), run_name="__main__")
    told = capsys.readouterr().out
    assert "20 sites, 8,448 trainable of" in told
    assert "default (active): qv:rlora; mlp:lora(r=4)" in told
    assert "× 4, layers 0-3" in told
    *_, shape, one, two, three, four = told.rstrip().splitlines()
    assert shape == "(4, 16, 128)"
    assert all(len(re.findall(r"\d+", row)) == 5 for row in (one, two, three, four))


def test_the_readme_has_one_command_for_the_demo_and_one_for_the_tests() -> None:
    commands = re.findall(r"```sh\n(.+)\n```", (ROOT / "README.md").read_text())
    assert len(commands) == 2
    assert commands[0].endswith("graphpeft demo")
    assert "-m pytest" in commands[1]
