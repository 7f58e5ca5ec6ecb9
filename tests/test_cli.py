"""The command line as a user meets it: output, exit codes, one-line errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner
from zoo import llama

from graphpeft.cli import app

run = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    llama().save_pretrained(path)
    (path / "model.safetensors").unlink()  # only the config is needed
    return str(path)


def test_plan_needs_no_weights(folder: str) -> None:
    result = run.invoke(app, ["plan", folder, "qv:rlora"])
    assert result.exit_code == 0, result.output
    assert "4 sites, 384 trainable of" in result.output


def test_sites(folder: str) -> None:
    result = run.invoke(app, ["sites", folder])
    assert result.exit_code == 0, result.output
    assert result.output.count("self_attn.q_proj.weight") == 2


def test_methods_lists_options_and_papers() -> None:
    result = run.invoke(app, ["methods"])
    assert result.exit_code == 0, result.output
    assert "rlora" in result.output
    assert "r=8 (int >= 1)" in result.output
    assert "arXiv:2106.09685" in result.output


def test_errors_are_told_without_a_trace(folder: str, tmp_path: Path) -> None:
    result = run.invoke(app, ["plan", folder, "qz:rlora"])
    assert result.exit_code == 1
    assert "RuleError" in result.output
    assert "^" in result.output
    assert "Traceback" not in result.output
    result = run.invoke(app, ["sites", str(tmp_path)])
    assert result.exit_code == 1
    assert "has no config.json" in result.output
