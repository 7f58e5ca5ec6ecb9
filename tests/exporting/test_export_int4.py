"""int4 exports are checked as users run them, the trained MiniLM among them; opsets, and the runtimes they were tried with."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import zoo
from checks import randomize
from exports import SAMPLE, deployed, silent
from onnx import numpy_helper
from torch import nn
from zoo import minilm

import graphpeft as gp
from graphpeft.errors import ExportError, FileError
from graphpeft.exporting import parity
from graphpeft.exporting.onnx import runtimes
from graphpeft.exporting.work import Verify
from graphpeft.runtime.doctor import doctor
from graphpeft.runtime.folder import REPORT

TEXT = torch.tensor(
    [[101, 1037, 21624, 2128, 26373, 2015, 19287, 102], [101, 1996, 4248, 2829, 4419, 14523, 2058, 102]]
)


def trained() -> nn.Module:
    model = minilm().eval()
    model.encoder.layer = model.encoder.layer[:1]
    gp.apply(model, "qv:lora(r=4); mlp:lora(r=4)")
    randomize(model, std=0.02)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, Any]]:
    """By accuracy_level, the export and its report."""
    folder = tmp_path_factory.mktemp("int4")
    found = {}
    for level in (0, 4):
        path = folder / str(level)
        verify: Verify = "full" if level == 4 else "fast"  # 4 is the default
        found[level] = path, gp.export(trained(), path, quantize="int4", accuracy_level=level, verify=verify)
    return found


def unpacked(path: Path) -> nn.Module:
    """The model in PyTorch with the weights that the graph's 4 bits stand for."""
    proto = onnx.load(path / "model.onnx")
    held = {each.name: numpy_helper.to_array(each) for each in proto.graph.initializer}
    model = trained()
    rounded = {}
    for node in proto.graph.node:
        if node.op_type == "MatMulNBits":
            sizes = {each.name: each.i for each in node.attribute}
            codes, scales, points = (held[name] for name in node.input[1:4])
            q = np.stack([codes & 15, codes >> 4], -1).reshape(sizes["N"], -1, sizes["block_size"]).astype(np.float32)
            zero = np.stack([points & 15, points >> 4], -1).reshape(sizes["N"], -1)[:, : q.shape[1]].astype(np.float32)
            weight = (q - zero[..., None]) * scales.reshape(sizes["N"], -1, 1)
            rounded[node.input[1]] = torch.from_numpy(weight.reshape(sizes["N"], -1)[:, : sizes["K"]])
    weights = {name: p for name, p in model.named_parameters() if p.dim() == 2 and "adapters" not in name}
    with torch.no_grad():
        for value in rounded.values():
            near = [p for p in weights.values() if p.shape == value.shape]
            # Whose matrix it is: a rounded one is near its own, and far from all others.
            own = min(near, key=lambda p: float((p - value).abs().mean()))
            own.copy_(value)
    return model


def users(path: Path, use: str | None) -> np.ndarray:
    session = gp.Session(path)
    session.use(use)
    return session.run({"input_ids": TEXT.numpy(), "attention_mask": np.ones_like(TEXT.numpy())})["last_hidden_state"]


@pytest.mark.parametrize("use", [None, "default"])
def test_what_users_get_is_what_was_checked(use: str | None, folders: dict[int, tuple[Path, Any]]) -> None:
    """Against PyTorch on the same rounded weights: level 0 to float rounding, level 4 to that of activations in 8 bits."""
    gaps = {}
    for level, (path, _) in folders.items():
        model = unpacked(path)
        gp.activate(model, use)
        with torch.no_grad():
            want = model(input_ids=TEXT).last_hidden_state.numpy()
        gaps[level] = float(np.abs(users(path, use) - want).max() / max(1.0, np.abs(want).max()))
    # float32 sums of some hundred terms; then steps of 1 / 127 of the largest of 32 values.
    assert gaps[0] < 1e-5
    assert 1e-4 < gaps[4] < parity.IN_8_BITS
    figures = {c.subject: c.value for c in folders[4][1].checks if c.test == "quantized"}
    told = figures["base model" if use is None else "adapter 'default'"]
    # Of the same kind, on other inputs: within a factor of three.
    assert told / 3 < gaps[4] < told * 3


def test_the_report_tells_of_rounded_activations(folders: dict[int, tuple[Path, Any]]) -> None:
    for level, limit in ((0, 1e-4), (4, parity.IN_8_BITS)):
        path, report = folders[level]
        found = [check for check in report.checks if check.test == "quantized"]
        assert max(check.limit for check in found) == limit
        assert {check.subject for check in found} == {"base model", "adapter 'default'"}
        proto = onnx.load(path / "model.onnx", load_external_data=False)
        levels = {
            a.i
            for n in proto.graph.node
            if n.op_type == "MatMulNBits"
            for a in n.attribute
            if a.name == "accuracy_level"
        }
        assert levels == ({4} if level else set()) or levels == {0}
        assert {p.key: p.value for p in proto.metadata_props}["graphpeft.accuracy_level"] == str(level)


def test_the_check_bites(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the limit of float sums, rounded activations are seen, and the export is refused; without packing they were not."""
    monkeypatch.setattr(parity, "IN_8_BITS", 1e-4)
    with pytest.raises(ExportError, match=r"quantized graph is .* off the same weights in float.*accuracy_level=0"):
        gp.export(trained(), tmp_path / "x", quantize="int4", verify="fast")
    assert not (tmp_path / "x").exists()


class Embedding(nn.Module):
    """Of length 1, so that no entry of it is large."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 256), nn.Linear(256, 384)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.two(self.one(x).relu()), dim=-1)


def test_small_outputs_are_held_to_their_own_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An adapter that the quantized graph has lost moves entries of 0.2 by a few hundredths, which is far off for them."""
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 5, 64)}
    model = gp.apply(Embedding().eval(), "path(one):lora(r=4)", inputs=inputs)
    randomize(model, std=0.05)
    export = partial(gp.export, model, inputs=inputs, quantize="int4", verify="fast")
    checks = [check for check in export(tmp_path / "good").checks if check.test == "quantized"]
    assert all(check.value < check.limit / 2 for check in checks)
    check = parity.check_quantized

    def lost(session: Any, *rest: Any) -> Any:
        return check(SimpleNamespace(use=lambda _: None, run=session.run), *rest)

    monkeypatch.setattr(parity, "check_quantized", lost)
    with pytest.raises(ExportError, match=r"adapter 'default': output .* of the quantized graph is"):
        export(tmp_path / "lost")


def test_without_packing_there_is_nothing_to_see(folders: dict[int, tuple[Path, Any]]) -> None:
    """Why the check opens the session that it does."""
    path, _ = folders[4]
    options = silent()
    options.add_session_config_entry("session.disable_prepacking", "1")
    feeds = {"input_ids": TEXT.numpy(), "attention_mask": np.ones_like(TEXT.numpy())}
    hidden = gp.Session(path, options=options).run(feeds)["last_hidden_state"]
    assert np.abs(hidden - users(folders[0][0], None)).max() < 1e-4
    assert np.abs(hidden - users(path, None)).max() > 1e-3


def test_the_level_is_one_of_two(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"accuracy_level=3: it must be 4, .* or 0\."):
        gp.export(deployed().model, tmp_path / "x", inputs=SAMPLE, quantize="int4", accuracy_level=3)


# -- opsets ----------------------------------------------------------------------------------------------------------


def test_the_default_opset_and_what_it_was_tried_with(tmp_path: Path) -> None:
    report = deployed().report
    assert report.opset == 23
    assert report.onnxruntime == runtimes.OLDEST[23]
    assert "opset 23, 2 slots" in str(report)
    assert f"tried with ONNX Runtime {runtimes.OLDEST[23]} and later" in str(report)
    assert json.loads((deployed().folder / REPORT).read_text())["onnxruntime"] == runtimes.OLDEST[23]
    (found, *_) = doctor(deployed().folder)
    assert f"tried with ONNX Runtime {runtimes.OLDEST[23]} and later, here {ort.__version__}" in found.text


@pytest.mark.parametrize("opset", [18, *(pytest.param(opset, marks=pytest.mark.slow) for opset in (20, 22))])
def test_an_opset_for_older_runtimes(opset: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = gp.apply(zoo.llama(layers=1).eval(), "qv:lora(r=2)")
    randomize(model)
    report = gp.export(model, tmp_path / "x", opset=opset)
    assert (report.opset, report.onnxruntime) == (opset, runtimes.OLDEST[opset])
    kinds = {node.op_type for node in onnx.load(tmp_path / "x" / "model.onnx").graph.node}
    assert not kinds & {"Attention", "RotaryEmbedding", "RMSNormalization"}
    assert gp.export(model, tmp_path / "y", verify="off").opset == 23
    kinds = {node.op_type for node in onnx.load(tmp_path / "y" / "model.onnx").graph.node}
    assert kinds >= {"Attention", "RMSNormalization"}


def test_every_opset_that_can_be_asked_for_was_tried() -> None:
    assert list(runtimes.OLDEST) == list(range(18, 24))


def test_a_doctor_where_the_runtime_is_too_old(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(deployed().folder, tmp_path / "deploy"))
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    proto.opset_import[0].version = 99
    onnx.save(proto, folder / "model.onnx")
    (found,) = doctor(folder)
    assert not found.good
    assert f"tried with ONNX Runtime {runtimes.OLDEST[23]} and later; here is {ort.__version__}" in found.text
    (folder / REPORT).write_text('{"onnxruntime": 5}')
    with pytest.raises(FileError, match="cannot load it"):
        gp.Session(folder)
    (found,) = doctor(folder)
    assert "tried with" not in found.text


def test_a_doctor_of_a_damaged_report(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(deployed().folder, tmp_path / "deploy"))
    for text in ('{"onnxruntime": 5}', '{"onnxruntime": "x\\ny"}', "[", '{"onnxruntime": "import"}'):
        (folder / REPORT).write_text(text)
        assert [one.about for one in doctor(folder) if not one.good] == [REPORT]
    (folder / REPORT).unlink()  # nothing that a session needs
    assert all(one.good for one in doctor(folder))
