"""CONTRIBUTING's recipes, followed from their own code blocks in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python (file|append|pipeline)=(\S+)\n(.*?)^```$", re.M | re.S)
RECIPES = re.split(r"^### ", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Recipes")[1], flags=re.M)[
    1:
]
GENERATED = {"graphpeft/registered.json", "graphpeft/__init__.pyi", "README.md", "docs/methods.md"}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What a contributor edits: the package, the tests of methods, and the pages with generated tables."""
    for name in ("graphpeft", "tests/methods", "tests/support", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.svg", "*.png"))
    for name in ("pyproject.toml", "README.md", "tests/conftest.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def follow(copy: Path, title: str) -> set[str]:
    """Write what the recipe of that title says, then generate; returns the files that were touched."""
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    (recipe,) = (text for text in RECIPES if text.startswith(title))
    for kind, target, code in BLOCK.findall(recipe):
        if kind == "pipeline":
            file = copy / "graphpeft" / "exporting" / "onnx" / "pipeline.py"
            text = file.read_text(encoding="utf-8")
            line = next(line for line in text.split("\n") if line.strip().startswith(f'"{target}":'))
            text = text.replace(line, f"{code}{line}")
            text = text.replace(
                "import ExportError\n", "import ExportError\nfrom graphpeft.exporting.onnx.label import label\n"
            )
            file.write_text(text, encoding="utf-8")
        else:
            file = copy / target
            assert file.exists() == (kind == "append"), target
            with file.open("a", encoding="utf-8") as out:
                out.write(code if file.suffix == ".pyi" or kind == "file" else f"\n\n{code}")
    run(copy, "-m", "graphpeft.generate", code=1)  # it wrote something
    after = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    return {str(path.relative_to(copy)) for path, content in after.items() if before.get(path) != content}


def run(copy: Path, *command: str, code: int = 0) -> str:
    found = subprocess.run(
        [sys.executable, *command], cwd=copy, env=os.environ | {"PYTHONPATH": str(copy)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert found.returncode == code, found.stdout + found.stderr
    return found.stdout


def test_a_method_is_one_file(copy: Path) -> None:
    touched = follow(copy, "A method")
    assert touched - GENERATED == {"graphpeft/methods/lorafa.py"}
    told = run(
        copy,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/methods/test_every_method.py",
        "-k",
        "lorafa and gpt2",
    )
    assert re.search(r"[1-9] passed", told)
    assert "`lorafa` | s · B · A* | r · out" in (copy / "README.md").read_text(encoding="utf-8")
    assert run(copy, "-c", "import graphpeft as gp; print(gp.LoRAFA(r=4))").strip() == "lorafa(r=4)"
    assert "lorafa" in run(copy, "-c", "from graphpeft.cli.complete import rules; print(rules('qv:l'))")


def test_a_role(copy: Path) -> None:
    assert follow(copy, "A role") - GENERATED == {"graphpeft/match/roles.py"}
    code = """
import torch, graphpeft as gp
class Bilinear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.fold = torch.nn.Linear(8, 12), torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)
    def forward(self, x):
        return x + self.fold(self.left(x) * self.right(x))
print(*[(s.role, s.weight) for s in gp.sites(Bilinear(), (torch.randn(2, 3, 8),))], sep="\\n")
"""
    told = run(copy, "-c", code)
    assert told.split("\n")[:-1] == [
        "('factor', 'left.weight')",
        "('factor', 'right.weight')",
        "('fold', 'fold.weight')",
    ]


def test_a_pass_that_reads(copy: Path) -> None:
    assert follow(copy, "A pass\n") - GENERATED == {"graphpeft/passes/norms.py"}
    code = """
import torch, graphpeft as gp
model = gp.apply(torch.nn.Sequential(torch.nn.Linear(4, 4)), "path(0):lora(r=2)", inputs=(torch.randn(2, 4),))
adapter = dict(model[0].named_parameters())
for name, p in adapter.items():
    torch.nn.init.ones_(p) if "adapters" in name else None
with gp.watch() as seen:
    print(gp.norms(model, "default"))
print([step.name for step in seen.steps])
"""
    key, steps = run(copy, "-c", code).strip().split("\n")
    assert key == "{'0.weight:head': 8.0}"  # ones (4, 2) @ ones (2, 4): sixteen entries of 2
    assert steps == "['norms']"


def test_a_pass_over_onnx_graphs(copy: Path) -> None:
    touched = follow(copy, "A pass over ONNX graphs") - GENERATED
    assert touched == {"graphpeft/exporting/onnx/label.py", "graphpeft/exporting/onnx/pipeline.py"}
    code = """
import onnx, torch, graphpeft as gp
model = gp.apply(torch.nn.Sequential(torch.nn.Linear(4, 4)), "path(0):lora(r=2)", inputs=(torch.randn(3, 4),))
report = gp.export(model, "out", inputs=(torch.randn(3, 4),), verify="fast")
print(report.passes, onnx.load("out/model.onnx").graph.doc_string)
"""
    assert run(copy, "-c", code).strip().endswith("('gemm', 'label', 'tags', 'defaults') 1 adapter slots")


def test_a_command(copy: Path) -> None:
    recipe = next(text for text in RECIPES if text.startswith("A command"))
    ((_, target, code),) = BLOCK.findall(recipe)
    with (copy / target).open("a", encoding="utf-8") as file:
        file.write(f"\n\n{code}")
    assert "Count the projections of a model." in run(copy, "-m", "graphpeft.cli.main", "--help")
    assert int(run(copy, "-m", "graphpeft.cli.main", "count", "gpt2")) > 48
