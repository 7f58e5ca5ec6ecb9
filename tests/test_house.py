"""The house: imports run one way, also in passes/; the public list; one version; what is generated is current."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import lazy_loader
import pytest
import tomllib

import graphpeft as gp
from graphpeft import generate, passes, registered

ROOT = Path(__file__).parents[1]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """The import contracts of a checkout."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package and its contracts, to be broken."""
    shutil.copytree(ROOT / "graphpeft", tmp_path / "graphpeft", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_run_one_way(copy: Path) -> None:
    found = lint(copy)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("passes/merge.py", "import graphpeft.inspect.why", "graphpeft.passes.merge -> graphpeft.inspect.why"),
        ("chain/inits.py", "import graphpeft.passes.insert", "graphpeft.chain.inits -> graphpeft.passes.insert"),
        ("passes/insert.py", "import graphpeft.passes.activate", "No circle between the files of a room BROKEN"),
        ("files/foreign.py", "import torch", "graphpeft.files.foreign -> torch"),
    ],
)
def test_a_forbidden_import_breaks_the_contract(copy: Path, file: str, line: str, broken: str) -> None:
    target = copy / "graphpeft" / file
    target.write_text(target.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    if broken.endswith("BROKEN"):  # the arrow back
        back = copy / "graphpeft" / "passes" / "activate.py"
        back.write_text(back.read_text(encoding="utf-8") + "\nimport graphpeft.passes.insert\n", encoding="utf-8")
    found = lint(copy)
    assert found.returncode == 1
    assert broken in found.stdout


def test_no_room_below_the_commands_imports_the_root() -> None:
    """The contract does not see that: to it, `from graphpeft import export` is an import of the root, which is in no room."""
    house = ROOT / "graphpeft"
    for file in house.rglob("*.py"):
        if file.relative_to(house).parts[0] in {"cli", "demo", "generate.py"}:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert "graphpeft" not in {alias.name for alias in node.names}, file
            elif isinstance(node, ast.ImportFrom) and node.module == "graphpeft":
                modules = [house / alias.name for alias in node.names]
                assert all(path.is_dir() or path.with_suffix(".py").is_file() for path in modules), file


def test_passes_stand_at_the_top_level() -> None:
    assert (ROOT / "passes").resolve() == ROOT / "graphpeft" / "passes"


def test_another_checkout_runs_its_own_passes(copy: Path) -> None:
    code = "import graphpeft.passes.merge as m; print(m.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()) == copy / "graphpeft" / "passes" / "merge.py"


def test_public_names_resolve_whatever_was_imported_before() -> None:
    for module in pkgutil.walk_packages(gp.__path__, "graphpeft."):
        if not module.name.startswith(("graphpeft.demo", "graphpeft.cli")):
            importlib.import_module(module.name)
    _, _, names = lazy_loader.attach_stub("graphpeft", str(gp.__file__))
    assert set(names) == set(gp.__all__) <= set(dir(gp))
    assert not [name for name in names if isinstance(getattr(gp, name), ModuleType)]
    assert not [name for name in names if importlib.util.find_spec(f"graphpeft.{name}")]
    errors = {name for name, value in vars(gp.errors).items() if isinstance(value, type)}
    assert errors <= set(names)
    with pytest.raises(AttributeError, match="plann"):
        gp.plann  # noqa: B018


@pytest.mark.parametrize("module", ["graphpeft", "graphpeft.cli.main", "graphpeft.runtime.session"])
def test_torch_is_not_loaded_before_it_is_used(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_there_is_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" not in project
    assert importlib.metadata.version("graphpeft") == gp.__version__


def test_what_is_generated_is_current() -> None:
    texts = generate.generated()
    assert {path.name for path in texts} == {"registered.json", "__init__.pyi", "README.md", "methods.md"}
    stale = [path.name for path, text in texts.items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run python -m graphpeft.generate"


def test_passes_are_of_one_shape() -> None:
    """A module of passes/ has passes and contexts over a model: what they work on comes first, and is called `model`."""
    known = registered.passes()
    for info in pkgutil.iter_modules(passes.__path__, "graphpeft.passes."):
        module = importlib.import_module(info.name)
        own = {n: f for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == info.name}
        public = {name: function for name, function in own.items() if not name.startswith("_")}
        assert public, info.name
        for name, function in public.items():
            assert next(iter(inspect.signature(function).parameters)) == "model", f"{info.name}.{name}"
        context = any(inspect.isgeneratorfunction(inspect.unwrap(function)) for function in public.values())
        assert context or info.name.rpartition(".")[2] in known


def test_the_architecture_page_has_every_room() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = [p for p in (ROOT / "graphpeft").iterdir() if (p.is_dir() and p.name != "__pycache__") or p.suffix == ".py"]
    names = {f"`{p.name}/`" if p.is_dir() else f"`{p.name}`" for p in rooms} - {"`__init__.py`"}
    assert not [name for name in names if name not in text]
