"""CONTRIBUTING's recipes, followed from their own code blocks in a copy of the repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python (file|append|pipeline)=(\S+)\n(.*?)^```$", re.M | re.S)
RECIPES = re.split(r"^### ", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Recipes")[1], flags=re.M)[
    1:
]
GENERATED = {"graphpeft/registered.json", "graphpeft/__init__.pyi", "README.md", "docs/methods.md"}


@dataclass
class Copy:
    """A copy of the repository in which every recipe was followed, and which files each of them touched."""

    folder: Path
    touched: dict[str, set[str]]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """What a contributor edits: the package, the tests of methods, and the pages with generated tables."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("graphpeft", "tests/methods", "tests/support", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.svg", "*.png"))
    for name in ("pyproject.toml", "README.md", "tests/conftest.py"):
        shutil.copy(ROOT / name, folder / name)
    made = Copy(folder, {recipe.partition("\n")[0]: follow(folder, recipe) for recipe in RECIPES})
    written = run(folder, "-m", "graphpeft.generate", code=1)  # as pre-commit: 1, for files have changed
    assert {line.removeprefix("written: ") for line in written.splitlines()} == GENERATED
    return made


def follow(folder: Path, recipe: str) -> set[str]:
    """Write what a recipe says; returns the files that it touched."""
    touched = set()
    for kind, target, code in BLOCK.findall(recipe):
        if kind == "pipeline":
            file = folder / "graphpeft" / "exporting" / "onnx" / "pipeline.py"
            text = file.read_text(encoding="utf-8")
            line = next(line for line in text.split("\n") if line.strip().startswith(f'"{target}":'))
            text = text.replace(line, f"{code}{line}")
            label = "\nfrom graphpeft.exporting.onnx.label import label"
            file.write_text(re.sub(r"(?=\nfrom graphpeft.exporting.onnx.quantize)", label, text), encoding="utf-8")
        else:
            file = folder / target
            assert file.exists() == (kind == "append"), target
            with file.open("a", encoding="utf-8") as out:
                out.write(code if file.suffix == ".pyi" or kind == "file" else f"\n\n{code}")
        touched.add(str(file.relative_to(folder)))
    return touched


def run(folder: Path, *command: str, code: int = 0, given: str | None = None) -> str:
    found = subprocess.run(
        [sys.executable, *command], cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True,
        input=given, check=False,
    )  # fmt: skip
    assert found.returncode == code, found.stdout + found.stderr
    return found.stdout


PROGRAMS = {
    "method": """
import graphpeft as gp
print(gp.LoRAFA(r=4))
""",
    "complete": """
from graphpeft.cli.complete import rules
print(rules("qv:l"))
""",
    "role": """
import torch, graphpeft as gp
class Bilinear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.fold = torch.nn.Linear(8, 12), torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)
    def forward(self, x):
        return x + self.fold(self.left(x) * self.right(x))
print(*[(s.role, s.weight) for s in gp.sites(Bilinear(), (torch.randn(2, 3, 8),))], sep="\\n")
""",
    "pass": """
import torch, graphpeft as gp
model = gp.apply(torch.nn.Sequential(torch.nn.Linear(4, 4)), "path(0):lora(r=2)", inputs=(torch.randn(2, 4),))
adapter = dict(model[0].named_parameters())
for name, p in adapter.items():
    torch.nn.init.ones_(p) if "adapters" in name else None
with gp.watch() as seen:
    print(gp.norms(model, "default"))
print([step.name for step in seen.steps])
""",
    "onnx": """
import onnx, torch, graphpeft as gp
model = gp.apply(torch.nn.Sequential(torch.nn.Linear(4, 4)), "path(0):lora(r=2)", inputs=(torch.randn(3, 4),))
report = gp.export(model, "out", inputs=(torch.randn(3, 4),), verify="fast")
print(report.passes, onnx.load("out/model.onnx").graph.doc_string)
""",
    "help": """
from typer.testing import CliRunner
from graphpeft.cli.main import app
print(CliRunner().invoke(app, ["--help"]).stdout)
""",
    "command": """
from typer.testing import CliRunner
from graphpeft.cli.main import app
print(CliRunner().invoke(app, ["count", "gpt2"]).stdout)
""",
}
TURN = """
import json, sys
from contextlib import redirect_stdout
from io import StringIO
said = {}
for name, code in json.load(sys.stdin).items():
    with redirect_stdout(StringIO()) as told:
        exec(code, {"__name__": name})
    said[name] = told.getvalue().strip()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(copy: Copy) -> dict[str, str]:
    """What each program prints, in one process of the copy, for most of the time goes to imports."""
    return json.loads(run(copy.folder, "-c", TURN, given=json.dumps(PROGRAMS)).strip().splitlines()[-1])


def test_a_method_is_one_file(copy: Copy, said: dict[str, str]) -> None:
    assert copy.touched["A method"] == {"graphpeft/methods/lorafa.py"}
    told = run(
        copy.folder,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/methods/test_every_method.py",
        "-k",
        "lorafa and life",
    )
    assert re.search(r"[1-9] passed", told)
    assert "`lorafa` | s · B · A* | r · out" in (copy.folder / "README.md").read_text(encoding="utf-8")
    assert said["method"] == "lorafa(r=4)"
    assert "lorafa" in said["complete"]


def test_a_role(copy: Copy, said: dict[str, str]) -> None:
    assert copy.touched["A role"] == {"graphpeft/match/roles.py"}
    assert said["role"].split("\n") == [
        "('factor', 'left.weight')",
        "('factor', 'right.weight')",
        "('fold', 'fold.weight')",
    ]


def test_a_pass_that_reads(copy: Copy, said: dict[str, str]) -> None:
    assert copy.touched["A pass"] == {"graphpeft/passes/norms.py", "graphpeft/__init__.pyi"}  # the latter to be public
    key, steps = said["pass"].split("\n")
    assert key == "{'0.weight:head': 8.0}"  # ones (4, 2) @ ones (2, 4): sixteen entries of 2
    assert steps == "['norms']"


def test_a_pass_over_onnx_graphs(copy: Copy, said: dict[str, str]) -> None:
    touched = copy.touched["A pass over ONNX graphs"]
    assert touched == {"graphpeft/exporting/onnx/label.py", "graphpeft/exporting/onnx/pipeline.py"}
    assert said["onnx"].endswith("('gemm', 'label', 'tags', 'defaults') 1 adapter slots")


def test_a_command(copy: Copy, said: dict[str, str]) -> None:
    assert copy.touched["A command"] == {"graphpeft/cli/look.py"}
    assert "Count the projections of a model." in said["help"]
    assert int(said["command"]) > 48
