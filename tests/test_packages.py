"""Wheel and source distribution hold the whole package, also where the checkout has no symbolic links."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = {path.relative_to(ROOT).as_posix() for path in (ROOT / "graphpeft").rglob("*.py")} | {
    "graphpeft/__init__.pyi", "graphpeft/py.typed", "graphpeft/registered.json", "graphpeft/rules/rules.lark",
    "graphpeft/inspect/report/page.html", "graphpeft/inspect/report/graph.js",
    "graphpeft/inspect/report/vendor/cytoscape.min.js",
}  # fmt: skip
BUILD = "import sys; from setuptools import build_meta as b; print(b.build_{}(sys.argv[1]))"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As git checks it out on a system without symbolic links: `passes` is a file with the path in it."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "graphpeft", folder / "graphpeft", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "passes").write_text("graphpeft/passes")
    return folder


def build(checkout: Path, kind: str, out: Path) -> Path:
    command = [sys.executable, "-c", BUILD.format(kind), str(out)]
    found = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return out / found.stdout.strip().splitlines()[-1]


def test_the_wheel_is_whole_and_runs(checkout: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build(checkout, "wheel", tmp_path)) as wheel:
        assert set(wheel.namelist()) >= NEEDED
        assert not [name for name in wheel.namelist() if name.startswith("passes")]
        wheel.extractall(tmp_path / "site")
    code = "import graphpeft as gp, graphpeft.passes.merge as m; print(gp.merge is m.merge, m.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["True", str(tmp_path / "site" / "graphpeft" / "passes" / "merge.py")]


def test_the_source_distribution_builds_the_same_wheel(checkout: Path, tmp_path: Path) -> None:
    with tarfile.open(build(checkout, "sdist", tmp_path)) as source:
        source.extractall(tmp_path / "source", filter="data")
    (folder,) = (tmp_path / "source").iterdir()
    with zipfile.ZipFile(build(folder, "wheel", tmp_path)) as wheel:
        assert set(wheel.namelist()) >= NEEDED
