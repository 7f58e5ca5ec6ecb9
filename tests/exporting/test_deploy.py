"""The exported folder: complete or not there, and never instead of somebody else's files."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from checks import build
from exports import SAMPLE, deployed, hand
from merging import forked

import graphpeft as gp
from graphpeft.errors import ExportError
from graphpeft.passes.export import export
from graphpeft.runtime.folder import staged


def test_report_is_printed_and_saved_with_every_figure() -> None:
    report = deployed().report
    saved = json.loads((deployed().folder / "graphpeft.json").read_text())
    assert [check["test"] for check in saved["checks"]] == ["slots", *["numbers"] * 3, *["effect"] * 2, "swap"]
    assert all(c.value >= c.limit if c.least else c.value <= c.limit for c in report.checks)
    assert {p.name for p in deployed().folder.iterdir()} == {*saved["files"], "graphpeft.json"}
    assert set(saved["files"]) == {
        "model.onnx",
        "model.onnx.data",
        "a.onnx_adapter",
        "a.json",
        "b.onnx_adapter",
        "b.json",
    }
    assert str(deployed().folder) not in json.dumps(saved)
    text = str(report)
    assert "swap     a > b > base > a" in text
    assert "2 slots" in text
    assert "not verified" not in text
    assert 'not verified: verify="off"' in str(replace(report, checks=(), verify="off"))


def test_a_folder_with_anything_else_is_refused_and_untouched(tmp_path: Path) -> None:
    def refused(match: str) -> None:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(ExportError, match=match), staged(tmp_path / "deploy"):
            pass
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    (tmp_path / "deploy").write_text("a file")
    refused("this is a file")
    (tmp_path / "deploy").unlink()
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "thesis.tex").write_text("years of work")
    refused("graphpeft's export did not write it")
    (tmp_path / "deploy" / "graphpeft.json").write_text('{"files": {"model.onnx": 1}}')
    refused("'thesis.tex' is not part of it")


def test_what_arrives_in_the_folder_during_an_export_is_not_lost(tmp_path: Path) -> None:
    export_to_be = staged(tmp_path / "deploy")
    export_to_be.__enter__()
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "late.txt").write_text("just now")
    with pytest.raises(ExportError, match="graphpeft's export did not write it"):
        export_to_be.__exit__(None, None, None)
    assert [path.name for path in tmp_path.rglob("*")] == ["deploy", "late.txt"]


@pytest.mark.parametrize(
    ("limit", "rule"),
    [
        pytest.param(2048, "qv:lora(r=2)", marks=pytest.mark.slow),
        (8192, "qv:lora(r=2)"),
        pytest.param(65536, "qv:lora(r=400)", marks=pytest.mark.slow),
    ],
    ids=["first weight", "between weights", "adapter"],
)
def test_a_disk_that_fills_half_way_leaves_nothing(tmp_path: Path, limit: int, rule: str) -> None:
    resource = pytest.importorskip("resource")
    target, model = tmp_path / "parent" / "deploy", hand(rule)

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes then fail, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with pytest.raises(Exception):  # noqa: B017  # the export went through, otherwise
            export(model, target, inputs=SAMPLE, verify="off")

    assert forked(fill) == 0
    assert list(target.parent.iterdir()) == []


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "v1", tmp_path / "current"
    target.mkdir()
    link.symlink_to("v1")
    with staged(link) as fresh:
        (fresh / "model.onnx").touch()
    assert link.is_symlink()
    assert [path.name for path in target.iterdir()] == ["model.onnx"]
    assert {path.name for path in tmp_path.iterdir()} == {"v1", "current"}


def test_the_folder_where_one_works_is_not_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "inside")
    for target in (Path("."), tmp_path / "here"):
        with pytest.raises(ExportError, match="this process's working directory"), staged(target):
            pass
    assert Path.cwd().is_dir()


@pytest.mark.parametrize("name", ["genai_config", "tokenizer", "graphpeft"])
def test_an_adapter_whose_sidecar_would_be_another_file_is_refused(name: str, tmp_path: Path) -> None:
    model = gp.apply(build("gpt2"), "qv:lora", name=name)
    with pytest.raises(ExportError, match=rf"can be called '{name}': {name}\.json is another file"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
