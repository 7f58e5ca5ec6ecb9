"""The example that docs/patterns.md walks through: a package with a role of its own, installed as a user would."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from graphpeft import match

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_role"
TEXT = Path(__file__).parents[2] / "docs" / "patterns.md"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the example; from a copy, for it builds in place."""
    if not (find_spec("pip") and find_spec("setuptools")):
        pytest.skip("needs pip and setuptools to build the package without a network")
    source, target = tmp_path_factory.mktemp("source") / "own_role", tmp_path_factory.mktemp("packages")
    shutil.copytree(EXAMPLE, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", target, source], check=True, timeout=120)
    return target


@cache
def run(*packages: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, packages)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLE / "run.py")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_an_installed_role_is_found_adapted_and_explained(packages: Path) -> None:
    result = run(packages)
    assert result.returncode == 0, result.stderr
    sites, explained, moved = result.stdout.strip().split("\n\n")
    assert [line.split()[:2] for line in sites.splitlines()[1:]] == [
        [role, f"blocks.{i}.{name}.weight"]
        for i in range(2)
        for role, name in (("factor", "left"), ("factor", "right"), ("fold", "fold"))
    ]
    assert explained.startswith("default (active): factor:lora(r=2); fold:lora(r=4)  —  6 sites, 640 parameters")
    assert [line.split()[:2] for line in explained.splitlines()[2:]] == [
        ["factor", "blocks.*.left.weight"], ["factor", "blocks.*.right.weight"], ["fold", "blocks.*.fold.weight"]
    ]  # fmt: skip
    on, off = (float(re.findall(r"[\d.]+$", line)[0]) for line in moved.splitlines())
    assert on > 0.05
    assert off == 0  # exactly: the base model was not touched


def test_without_the_package_the_role_is_unknown() -> None:
    result = run()
    assert result.returncode != 0
    assert "Unknown target factor" in result.stderr


def test_the_text_shows_the_declaration_and_what_the_script_prints(packages: Path) -> None:
    text = TEXT.read_text(encoding="utf-8")
    code = (EXAMPLE / "bilinear_roles.py").read_text(encoding="utf-8").split('"""', 2)[2].strip()
    assert code in text
    declared = code.partition("FACTOR =")[2].splitlines()
    assert len(declared) < 10
    assert run(packages).stdout.split("\n\n")[1] in text


def test_every_pattern_of_the_text_is_written_as_shown() -> None:
    """The example column, evaluated; a pattern that is exported and not in the table is missing there."""
    known = {name: getattr(match, name) for name in match.__all__}
    parts = dict.fromkeys(("A", "B", "P", "Q", "K", "V", "GATE", "UP", "PROBS", "SCORES"), match.ANY)
    rows = re.findall(r"^\| (`.+?`) \| .* \| `(.+)` \|$", TEXT.read_text(encoding="utf-8"), flags=re.M)
    assert len(rows) > 15
    for _, example in rows:
        made = eval(example.replace("\\|", "|"), known | parts | {"two": lambda flow, match: None})
        assert isinstance(made, match.Pattern), example
    shown = set(re.findall(r"\w+", " ".join(name for name, _ in rows)))
    assert shown >= {n for n in match.__all__ if n.islower() or n.isupper()} - {"register"}


def test_the_roles_of_the_text_are_the_declared_ones() -> None:
    table = TEXT.read_text(encoding="utf-8").partition("## Patterns")[0]
    named = {
        word for cell in re.findall(r"^\| (`.+?) \|", table, flags=re.M) for word in re.findall(r"`([\w.]+)`", cell)
    }
    assert named == {*match.registry.roles(), *match.registry.ALIASES}
