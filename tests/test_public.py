"""The public list: every name is there, is the object and not a module of that name, and does not load before it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import graphpeft as gp


def test_names_resolve_and_types_see_the_same_ones() -> None:
    import graphpeft.applying
    import graphpeft.capturing.capture
    import graphpeft.planning.plan  # noqa: F401  # the modules, whose import would put them in the functions' places

    found = {name: getattr(gp, name) for name in gp.__all__}
    assert not [name for name, value in found.items() if isinstance(value, ModuleType)]
    tree = ast.parse(Path(str(gp.__file__)).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.asname: each.module for each in block.body if isinstance(each, ast.ImportFrom) for alias in each.names
    }
    assert typed == {name: f"graphpeft.{home}" for name, home in gp.HOMES.items()}
    assert set(dir(gp)) >= set(gp.__all__)


@pytest.mark.parametrize("module", ["graphpeft", "graphpeft.cli.main", "graphpeft.runtime.session"])
def test_torch_is_not_loaded_before_it_is_used(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
