"""Methods of other packages, found by the entry point `graphpeft.methods`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
METHOD = re.search(r"^```python file=graphpeft/methods/lorafa.py\n(.*?)^```$", TEXT, re.M | re.S)[1]  # type: ignore[index]
USE = """
import torch, graphpeft as gp
from torch import nn
model = gp.apply(nn.Sequential(nn.Linear(4, 4)), "path(0):lorafa(r=2)", inputs=(torch.ones(2, 4),))
print(gp.trainable(model)[0])
gp.save(model, "adapter")
print(gp.explain(gp.load(nn.Sequential(nn.Linear(4, 4)), "adapter", any_base=True)).adapters[0].sites[0].method)
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A package as pip leaves it."""
    (tmp_path / "my_methods.py").write_text(METHOD, encoding="utf-8")
    about = tmp_path / "my_methods-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-methods\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text("[graphpeft.methods]\nlorafa = my_methods:LoRAFA\n")
    return tmp_path


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", USE], cwd=folder, env=os.environ | {"PYTHONPATH": paths},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_rules_and_files_know_it(installed: Path) -> None:
    found = run(installed)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["8", "lorafa(r=2)"]


def test_a_package_that_cannot_be_loaded_is_named(installed: Path) -> None:
    (installed / "my_methods.py").write_text("import nothing_of_the_kind\n")
    found = run(installed)
    assert found.returncode == 1
    assert re.search(
        r"RuleError: The method of my-methods \(entry point lorafa = my_methods:LoRAFA\) cannot be loaded", found.stderr
    )
