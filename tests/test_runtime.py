"""Session: what it runs, and that it refuses what ONNX Runtime would take in silence."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from exports import CLOSE, SAMPLE, deployed, off, silent

from graphpeft import onnx
from graphpeft.errors import AdapterError, FileError
from graphpeft.runtime import Session

X = SAMPLE["x"]
A, B = "wq.lora_A.weight", "wq.lora_B.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(deployed().folder, tmp_path / "copy"))


def test_adapters_are_found_and_used_one_at_a_time() -> None:
    session = Session(deployed().folder)
    assert session.adapters == ("a", "b")
    assert session.active is None
    for name in (None, "a", "b", "a", None):
        session.use(name)
        assert session.active == name
        gc.collect()  # a LoraAdapter that nothing holds would now be gone, and the base would answer
        got = session.run({"x": X.numpy()})["output"]
        assert off(got, deployed().want[name]) < CLOSE
        assert all(off(got, deployed().want[other]) > 0.1 for other in {None, "a", "b"} - {name})


def test_plain_onnxruntime_reads_the_same_folder() -> None:
    session = ort.InferenceSession(str(deployed().folder / "model.onnx"), silent())
    adapter = ort.LoraAdapter()
    adapter.Load(str(deployed().folder / "b.onnx_adapter"))
    run = ort.RunOptions()
    run.add_active_adapter(adapter)
    assert off(session.run(None, {"x": X.numpy()}, run)[0], deployed().want["b"]) < CLOSE


def test_an_adapter_of_another_rank_and_fewer_sites_fits(folder: Path) -> None:
    write(folder, "wide", {A: torch.ones(32, 40), B: torch.ones(40, 32)})
    session = Session(folder)
    session.use("wide")
    assert session.run({"x": X.numpy()})["output"].shape == (2, 5, 32)


def test_options_and_providers_are_the_callers() -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = Session(deployed().folder, providers=["CPUExecutionProvider"], options=options)
    assert session.inference.get_session_options().log_severity_level == 4


def test_unknown_and_several_adapters_are_refused() -> None:
    session = Session(deployed().folder)
    session.use("a")
    with pytest.raises(AdapterError, match=r"no adapter 'c'. Adapters of this folder: a, b"):
        session.use("c")
    with pytest.raises(AdapterError, match="one adapter at a time"):
        session.use(["a", "b"])  # type: ignore[arg-type]
    assert session.active == "a"


def test_slots_cannot_be_fed_past_the_session() -> None:
    with pytest.raises(AdapterError, match=r"wq.lora_A.weight is a slot.*use\(\)"):
        Session(deployed().folder).run({"x": X.numpy(), A: np.zeros((32, 1), np.float32)})


def test_folders_that_are_no_export_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"there is no model.onnx"):
        Session(tmp_path)
    onnx.annotate(folder / "model.onnx", {"graphpeft.schema": "99"})
    with pytest.raises(FileError, match=r"graphpeft.schema is '99'.*reads 1"):
        Session(folder)
    (folder / "model.onnx.data").unlink()
    with pytest.raises(FileError, match=r"cannot load it.*model.onnx.data was not copied"):
        Session(folder)


def write(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    onnx.write_adapter(folder, name, tensors, {"base": json.loads((folder / "a.json").read_text())["base"]})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"wk.lora_A.weight": torch.ones(32, 2)}, "no slot 'wk.lora_A.weight'; 'wk' takes no adapter"),
        ({"weight": torch.ones(32, 2)}, "no slot 'weight'; 'weight' takes no adapter"),
        ({A: torch.ones(32, 2).half(), B: torch.ones(2, 32)}, r"at 'wq' lora_A is tensor\(float16\)"),
        ({A: torch.ones(31, 2), B: torch.ones(2, 32)}, r"at 'wq' lora_A has shape \[31, 2\]"),
        ({A: torch.ones(32, 2), B: torch.ones(2, 33)}, r"at 'wq' lora_B has shape \[2, 33\]"),
        ({A: torch.ones(32), B: torch.ones(2, 32)}, r"at 'wq' lora_A has shape \[32\]"),
        ({A: torch.ones(32, 2)}, "at 'wq' it has lora_A only"),
        ({A: torch.ones(32, 2), B: torch.ones(3, 32)}, "at 'wq' the ranks of A and B are 2 and 3"),
    ],
    ids=["site", "name", "dtype", "inputs", "outputs", "axes", "half", "ranks"],
)
def test_adapters_that_do_not_fit_are_refused_by_site(
    folder: Path, given: dict[str, torch.Tensor], message: str
) -> None:
    write(folder, "odd", given)
    with pytest.raises(FileError, match=rf"odd.onnx_adapter: .*{message}.*Remedy: export model and adapter together"):
        Session(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "a.json").unlink(), "a.json: missing or unreadable.*copy both files together"),
        (lambda f: (f / "a.json").write_text("[]"), "a.json: missing or unreadable"),
        (lambda f: (f / "a.json").write_text('{"base": "0123456789abcdef"}'), "made for base model 0123456789ab, but"),
        (lambda f: (f / "a.onnx_adapter").write_bytes(b"not flat buffers"), "not an adapter of ONNX Runtime"),
    ],
    ids=["sidecar gone", "sidecar garbled", "other base", "garbled"],
)
def test_adapters_of_unknown_origin_are_refused(folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(folder)
    with pytest.raises(FileError, match=message):
        Session(folder)
