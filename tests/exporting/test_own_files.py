"""An export replaces its own files alone, whatever the report in a folder lists."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from graphpeft.errors import ExportError
from graphpeft.inspect.watch import watch
from graphpeft.runtime.folder import staged

OLD = Path(__file__).parents[1] / "fixtures" / "0.1" / "export_pair"


def export_to(target: Path) -> None:
    with staged(target) as fresh:
        (fresh / "model.onnx").write_text("new")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "deploy"))


def report(folder: Path, **changes: Any) -> None:
    told = json.loads((OLD / "graphpeft.json").read_text())
    (folder / "graphpeft.json").write_text(json.dumps({**told, **changes}))


@pytest.mark.parametrize("name", [
    "thesis.txt", "package.json", ".bashrc", "data.csv", "other.onnx", "pair.py", "model.safetensors", "config.json", "x.json",
    "model.onnx.bak", "adapter_config.json",
])  # fmt: skip
def test_a_report_that_lists_other_files(name: str, target: Path) -> None:
    (target / name).write_text("{}")
    report(target, files={**json.loads((OLD / "graphpeft.json").read_text())["files"], name: 2},
           adapters=["pair", *([Path(name).stem] if name.endswith(".json") else [])])  # fmt: skip
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(ExportError, match=rf"'{name}' is not part of it and would be lost\. Export to a new folder"):
        export_to(target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


@pytest.mark.parametrize("name", ["model.onnx", "vocab.txt", "additional_chat_templates", "pair.onnx_adapter"])
def test_a_folder_under_the_name_of_a_file(name: str, target: Path) -> None:
    (target / name).unlink(missing_ok=True)
    (target / name).mkdir()
    (target / name / "thesis.txt").write_text("mine")
    report(target, files={path.name: 1 for path in target.iterdir()})
    with pytest.raises(ExportError, match="would be lost"):
        export_to(target)
    assert (target / name / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("content", [
    {"files": ["thesis.txt"]}, {"files": {"../thesis.txt": 1}}, {"files": {"thesis.txt": 1}}, {"adapters": ["thesis.txt"]}, [], 5,
])  # fmt: skip
def test_a_folder_that_no_export_wrote(content: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "mine" / "graphpeft.json").write_text(json.dumps(content))
    with pytest.raises(ExportError, match=r"did not write it|is not part of it"):
        export_to(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_an_earlier_export_is_replaced_with_what_a_tokenizer_wrote(target: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt", "chat_template.jinja", "genai_config.json"):
        (target / name).write_text("{}")
    (target / "additional_chat_templates").mkdir()
    (target / "additional_chat_templates" / "tool.jinja").write_text("")
    report(target, files={path.name: 1 for path in target.iterdir()})
    export_to(target)
    assert [path.name for path in target.iterdir()] == ["model.onnx"]
    assert [path.name for path in target.parent.iterdir()] == ["deploy"]


def test_the_target_of_a_link_stays(target: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    (target / "model.onnx").unlink()
    (target / "model.onnx").symlink_to(tmp_path / "thesis.txt")
    export_to(target)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert (target / "model.onnx").read_text() == "new"


@pytest.mark.parametrize("exchanged", [True, False])
def test_what_comes_in_the_last_moment_stays(exchanged: bool, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphpeft.runtime import folder

    real = folder._replace

    def late(*given: Path) -> None:
        (target / "late.txt").write_text("mine")
        real(*given)

    monkeypatch.setattr(folder, "_replace", late)
    if not exchanged:
        monkeypatch.setattr(folder, "swap_dirs", lambda one, other: False)
    export_to(target)
    assert (target / "late.txt").read_text() == "mine"
    assert (target / "model.onnx").read_text() == "new"


def test_a_folder_that_only_has_the_name_of_an_old_export(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphpeft.runtime import folder

    monkeypatch.setattr(folder, "swap_dirs", lambda one, other: False)
    (target.parent / ".deploy.old").mkdir()
    (target.parent / ".deploy.old" / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match="did not write it"):
        export_to(target)
    assert (target.parent / ".deploy.old" / "thesis.txt").read_text() == "mine"


def test_a_dump_deletes_its_own_files_alone(tmp_path: Path) -> None:
    """The same for `gp.watch`, whose index lists the files of an earlier dump."""
    with watch(tmp_path / "dump"):
        pass
    (tmp_path / "dump" / "thesis.txt").write_text("mine")
    (tmp_path / "dump" / "01-apply.txt").write_text("")
    listed = ["thesis.txt", "01-apply.txt", "../x"]
    (tmp_path / "dump" / "steps.json").write_text(json.dumps({"graphpeft_steps": [{"files": listed}]}))
    with watch(tmp_path / "dump"):
        pass
    assert (tmp_path / "dump" / "thesis.txt").read_text() == "mine"
    assert not (tmp_path / "dump" / "01-apply.txt").exists()
