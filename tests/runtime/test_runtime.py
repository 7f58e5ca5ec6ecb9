"""Session: what it runs, and that it refuses what ONNX Runtime would take in silence."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from checks import randomize
from exports import CLOSE, FAR, SAMPLE, dense, deployed, off, silent, tiny

import graphpeft as gp
from graphpeft.errors import AdapterError, FileError
from graphpeft.exporting import onnx
from graphpeft.runtime.doctor import doctor
from graphpeft.runtime.session import Session

X = SAMPLE["x"]
A, B = "wq.lora_A.weight", "wq.lora_B.weight"
SHARED, OTHER = "wq+wv.lora_A.weight", "wv.lora_B.weight"


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
    write(folder, "wide", {A: ones(32, 40), B: ones(40, 32)})
    session = Session(folder)
    session.use("wide")
    assert session.run({"x": X.numpy()})["output"].shape == (2, 5, 32)


def test_options_and_providers_are_the_callers() -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = Session(deployed().folder, providers=["CPUExecutionProvider"], options=options)
    assert session.inference.get_session_options().log_severity_level == 4


def test_unknown_adapters_are_refused_and_change_nothing() -> None:
    session = Session(deployed().folder)
    session.use("a")
    with pytest.raises(AdapterError, match=r"no adapter 'c'. Adapters of this folder: a, b"):
        session.use("c")
    for mix in ({"a": 0.5, "c": 0.5}, ["a", "c"]):
        with pytest.raises(AdapterError, match="no adapter 'c'"):
            session.use(mix)
    with pytest.raises(AdapterError, match=r"use\(1\): pass a name, strengths by name"):
        session.use(1)  # type: ignore[arg-type]
    assert session.active == "a"
    assert off(session.run({"x": X.numpy()})["output"], deployed().want["a"]) < CLOSE


def test_slots_cannot_be_fed_past_the_session() -> None:
    with pytest.raises(AdapterError, match=r"wv.lora_B.weight is a slot.*use\(\)"):
        Session(deployed().folder).run({"x": X.numpy(), OTHER: ones(1, 32)})


def test_folders_that_are_no_export_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"there is no model.onnx"):
        Session(tmp_path)
    onnx.annotate(folder / "model.onnx", {"graphpeft.schema": "99"})
    with pytest.raises(FileError, match=r"graphpeft.schema is '99'.*reads 2"):
        Session(folder)
    (folder / "model.onnx.data").unlink()
    with pytest.raises(FileError, match=r"cannot load it.*model.onnx.data was not copied"):
        Session(folder)


def ones(*shape: int, kind: type = np.float32) -> np.ndarray:
    return np.ones(shape, kind)


def write(folder: Path, name: str, tensors: Mapping[str, np.ndarray]) -> Path:
    onnx.write_adapter(folder, name, {"model": dict(tensors)}, {"base": Session(folder).graphs["model"].base})
    return folder / f"{name}.onnx_adapter"


def nan(*shape: int) -> np.ndarray:
    values = ones(*shape)
    values[-1, -1] = np.nan
    return values


REMEDY = ".*Remedy: export model and adapter together"
MISFITS = {
    "site": ({"wk.lora_A.weight": ones(32, 2)}, "no slot 'wk.lora_A.weight'; 'wk' takes no adapter" + REMEDY),
    "name": ({"weight": ones(32, 2)}, "no slot 'weight'; 'weight' takes no adapter" + REMEDY),
    "stranger": ({A: ones(32, 2), B: ones(2, 32), "x": ones(2, 5, 32)}, "no slot 'x'; 'x' takes no adapter" + REMEDY),
    "dtype": ({A: ones(32, 2, kind=np.float16), B: ones(2, 32)}, r"at 'wq' lora_A is float16, .*tensor\(float\)" + REMEDY),
    "shared dtype": (
        {SHARED: ones(32, 2), B: ones(2, 32), OTHER: ones(2, 32, kind=np.float64)},
        r"at 'wv' lora_B is float64, but its slot is tensor\(float\)" + REMEDY,
    ),
    "inputs": ({A: ones(31, 2), B: ones(2, 32)}, r"at 'wq' lora_A has shape \[31, 2\]" + REMEDY),
    "outputs": ({A: ones(32, 2), B: ones(2, 33)}, r"at 'wq' lora_B has shape \[2, 33\]" + REMEDY),
    "transposed": ({"out.lora_A.weight": ones(2, 32), "out.lora_B.weight": ones(2, 32)}, r"at 'out' lora_A .*\[2, 32\]" + REMEDY),
    "axes": ({A: ones(32), B: ones(2, 32)}, r"at 'wq' lora_A has shape \[32\]" + REMEDY),
    "no B": ({A: ones(32, 2)}, "at 'wq' it has lora_A only" + REMEDY),
    "no A": ({B: ones(2, 32)}, "at 'wq' it has lora_B only" + REMEDY),
    "no shared A": ({B: ones(2, 32), OTHER: ones(2, 32)}, "at 'wq' it has lora_B only" + REMEDY),
    "one B of two": ({SHARED: ones(32, 2), B: ones(2, 32)}, "at 'wv' it has lora_A only" + REMEDY),
    "ranks": ({A: ones(32, 2), B: ones(3, 32)}, "at 'wq' the ranks of A and B are 2 and 3" + REMEDY),
    "shared ranks": (
        {SHARED: ones(32, 2), B: ones(2, 32), OTHER: ones(1, 32)}, "at 'wv' the ranks of A and B are 2 and 1" + REMEDY
    ),
    "nan": ({A: ones(32, 2), B: nan(2, 32)}, "at 'wq' lora_B has values that are not finite. Train the adapter again"),
    "infinite": ({A: nan(32, 2) * np.inf, B: ones(2, 32)}, "at 'wq' lora_A has values that are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("given", MISFITS)
def test_adapters_that_do_not_fit_are_refused_by_site(folder: Path, given: str) -> None:
    tensors, message = MISFITS[given]
    session = Session(folder)
    with pytest.raises(FileError, match=rf"odd.onnx_adapter: .*{message}"):
        session.add(write(folder, "odd", tensors))
    assert session.adapters == ("a", "b")
    with pytest.raises(FileError, match=message):
        Session(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "a.json").unlink(), "a.json: missing or unreadable.*copy both files together"),
        (lambda f: (f / "a.json").write_text("[]"), "a.json: missing or unreadable"),
        (
            lambda f: (f / "a.json").write_text(json.dumps({"base": "0123456789abcdef" * 4})),
            "made for base model 0123456789ab, but",
        ),
        (lambda f: (f / "a.onnx_adapter").write_bytes(b"not flat buffers"), "a.onnx_adapter: not an adapter of ONNX"),
    ],
    ids=["sidecar gone", "sidecar garbled", "other base", "garbled"],
)
def test_adapters_of_unknown_origin_are_refused(folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(folder)
    with pytest.raises(FileError, match=message):
        Session(folder)


@pytest.mark.parametrize("kept", [0, 7, 0.3, 0.7, 0.99], ids=str)
def test_a_file_that_was_cut_off_is_refused(folder: Path, kept: float) -> None:
    whole = (folder / "a.onnx_adapter").read_bytes()
    (folder / "a.onnx_adapter").write_bytes(whole[: kept if isinstance(kept, int) else int(len(whole) * kept)])
    with pytest.raises(FileError, match=r"a.onnx_adapter: not an adapter of ONNX Runtime"):
        Session(folder)


def test_two_adapters_of_one_name_are_refused_and_one_can_be_renamed(folder: Path) -> None:
    session = Session(folder)
    with pytest.raises(AdapterError, match=r"a.onnx_adapter: this session already has an adapter 'a'.*name="):
        session.add(folder / "a.onnx_adapter")
    assert session.add(folder / "a.onnx_adapter", name="c") == "c"
    session.use("c")
    assert off(session.run({"x": X.numpy()})["output"], deployed().want["a"]) < CLOSE


def test_a_session_adds_adapters_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "away").mkdir()
    for file in ("b.onnx_adapter", "b.json"):
        (folder / file).rename(tmp_path / "away" / file)
    session = Session(folder)
    assert session.adapters == ("a",)
    assert session.add(tmp_path / "away" / "b.onnx_adapter") == "b"
    session.use("b")
    assert off(session.run({"x": X.numpy()})["output"], deployed().want["b"]) < CLOSE


# -- blends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [{"a": 0.7, "b": 0.3}, {"a": -1.0}, {"a": 1.0, "b": 1.0}, {"b": 0.0}, {}], ids=str)
def test_a_blend_adds_up_the_updates_by_strength(mix: dict[str, float]) -> None:
    session = Session(deployed().folder)
    session.use(mix)
    # The update is added to the weight here and to the output there: one more rounding of values up to 5.
    assert off(session.run({"x": X.numpy()})["output"], dense(mix, X)) < 2 * CLOSE
    session.use("a")
    assert off(session.run({"x": X.numpy()})["output"], deployed().want["a"]) < CLOSE


def test_a_blend_of_two_is_neither_of_them() -> None:
    assert min(off(dense({"a": 0.5, "b": 0.5}, X), deployed().want[name]) for name in (None, "a", "b")) > FAR


def test_of_two_graphs_the_one_without_slots_decides_nothing(tmp_path: Path) -> None:
    model = gp.apply(tiny("t5"), "path(encoder.*.SelfAttention.q):vera(r=8)", name="enc")
    randomize(model, "enc")
    gp.export(model, tmp_path / "out", compact=True, verify="off")
    session = Session(tmp_path / "out")
    with pytest.raises(AdapterError, match="a compact export holds one method's own tensors"):
        session.use({"enc": 1.0})
    (tmp_path / "out" / "enc.decoder.onnx_adapter").unlink()
    with pytest.raises(FileError, match=r"enc\.decoder\.onnx_adapter: there is no such file.*one for each graph"):
        Session(tmp_path / "out")
    assert not all(one.good for one in doctor(tmp_path / "out"))
