"""`graphpeft doctor`: what fits, and what does not and why."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from exports import deployed
from typer.testing import CliRunner

from graphpeft.cli.main import app
from graphpeft.errors import FileError
from graphpeft.runtime.adapter_file import read, write
from graphpeft.runtime.doctor import doctor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(deployed().folder, tmp_path / "deploy"))


def test_a_sound_folder(folder: Path) -> None:
    found = doctor(folder)
    assert all(one.good for one in found)
    assert [one.about for one in found] == ["model.onnx", "a.onnx_adapter", "b.onnx_adapter"]
    assert "3 of 3 sites" in found[1].text


def test_a_folder_without_its_weights(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    (found,) = doctor(folder)
    assert not found.good
    assert "was not copied along" in found.text


def test_names_of_another_tool(folder: Path, tmp_path: Path) -> None:
    tensors = read(folder / "a.onnx_adapter")
    renamed = {name.replace(".weight", ".default.weight"): value for name, value in tensors.items()}
    write(tmp_path / "x.onnx_adapter", renamed, "0" * 64)
    texts = [one.text for one in doctor(folder, tmp_path / "x.onnx_adapter") if not one.good]
    assert "missing or unreadable" in texts[0]
    assert "has no slot" in texts[1]
    assert "closest to" in texts[2]


def test_an_adapter_that_was_never_trained(folder: Path) -> None:
    tensors = read(folder / "a.onnx_adapter")
    write(
        folder / "a.onnx_adapter",
        {n: np.zeros_like(v) if "lora_B" in n else v for n, v in tensors.items()},
        "0" * 64,
    )
    assert any("does nothing there" in one.text for one in doctor(folder, folder / "a.onnx_adapter") if not one.good)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such folder"):
        doctor(tmp_path / "none")


def test_the_command_says_it_by_its_exit(folder: Path) -> None:
    sound = CliRunner().invoke(app, ["doctor", str(folder)])
    assert (sound.exit_code, sound.output.count("ok ")) == (0, 3)
    (folder / "b.json").unlink()
    broken = CliRunner().invoke(app, ["doctor", str(folder)])
    assert broken.exit_code == 1
    assert "WRONG b.onnx_adapter" in broken.output
