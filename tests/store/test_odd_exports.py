"""Exports whose metadata or files are not what an export writes are refused by our errors, and in little time."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from exports import SAMPLE, deployed, off

import graphpeft as gp
from graphpeft.errors import FileError
from graphpeft.runtime.doctor import doctor


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return Path(shutil.copytree(deployed().folder, tmp_path / "deploy"))


def rewritten(graph: Path, key: str, change: Callable[[str], str]) -> None:
    proto = onnx.load(graph, load_external_data=False)
    (entry,) = (each for each in proto.metadata_props if each.key == f"graphpeft.{key}")
    entry.value = change(entry.value)
    onnx.save(proto, graph)


def slot(**fields: Any) -> Callable[[str], str]:
    """Other fields in the first slot."""
    return lambda text: json.dumps([{**json.loads(text)[0], **fields}, *json.loads(text)[1:]])


ODD: dict[str, tuple[str, Callable[[str], str]]] = {
    "deep": ("slots", lambda text: "[" * 1_000_000),
    "deep and closed": ("slots", lambda text: "[" * 900 + "]" * 900),
    "many": ("slots", lambda text: "[" + "1," * 1_000_000 + "1]"),
    "digits": ("slots", lambda text: '[{"inputs":' + "9" * 5000 + "}]"),
    "no list": ("slots", lambda text: "null"),
    "text for a slot": ("slots", lambda text: '["tensors"]'),
    "twice": ("slots", lambda text: json.dumps(json.loads(text) * 2)),
    "negative": ("slots", slot(inputs=-1)),
    "not a number": ("slots", slot(inputs=float("nan"))),
    "huge": ("slots", slot(inputs=10**30)),
    "no tensors": ("slots", slot(tensors=None)),
    "odd tensors": ("slots", slot(site="q", tensors={"a": [[1]]})),
    "escape": ("slots", slot(sites={"\x1b[2J": 3})),
    "half a character": ("slots", slot(sites={"\ud800": 3})),
    "tokens": ("generation", lambda text: json.dumps({"eos_token_id": 10**40})),
    "deep tokens": ("generation", lambda text: '{"eos_token_id":' * 100_000),
    "long base": ("base", lambda text: "a" * 4_000_000),
    "names": ("mode", lambda text: "a," * 100_000 + "!"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_metadata(kind: str, export: Path) -> None:
    key, change = ODD[kind]
    rewritten(export / "model.onnx", key, change)
    start = time.thread_time()
    with pytest.raises(FileError, match=rf"model\.onnx: graphpeft\.{key} in the model's metadata is .*Usually") as told:
        gp.Session(export)
    assert len(str(told.value)) < 1000
    assert [finding.good for finding in doctor(export)] == [False]
    assert time.thread_time() - start < 5


def test_a_name_with_control_characters_is_refused_though_the_graph_has_it(export: Path) -> None:
    """A terminal would obey them."""
    graph, name = export / "model.onnx", "wq\x1b[2J"
    proto = onnx.load(graph, load_external_data=False)
    old, new = "out.lora_A.weight", f"{name}.lora_A.weight"
    table = next(each for each in proto.metadata_props if each.key == "graphpeft.slots")
    assert old in table.value
    table.value = table.value.replace('"out', json.dumps(name)[:-1])
    for each in (*proto.graph.input, *proto.graph.initializer):
        each.name = each.name.replace("out.lora", f"{name}.lora")
    for node in proto.graph.node:
        node.input[:] = [each.replace("out.lora", f"{name}.lora") for each in node.input]
    onnx.save(proto, graph)
    assert new in {each.name for each in onnx.load(graph, load_external_data=False).graph.input}
    with pytest.raises(FileError, match=r"graphpeft\.slots in the model's metadata is"):
        gp.Session(export, adapters=False)


FILES = ["model.onnx", "model.onnx.data", "a.onnx_adapter", "a.json"]
KINDS: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo if hasattr(os, "mkfifo") else Path.mkdir,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "the memory of a process": lambda path: path.symlink_to("/proc/self/mem"),
    "a terabyte": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
    "nothing": lambda path: path.touch(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_something_else_in_place_of_a_file(name: str, kind: str, export: Path) -> None:
    path = export / name
    path.unlink()
    if kind == "a terabyte" and name == "model.onnx.data":
        pytest.skip("zeros are weights, too")
    try:
        KINDS[kind](path)
    except OSError:
        pytest.skip("this system has no such thing")
    start = time.monotonic()
    with pytest.raises(FileError):
        gp.Session(export)
    assert not all(finding.good for finding in doctor(export))
    assert time.monotonic() - start < 10


def test_the_intact_export_opens(export: Path) -> None:
    rewritten(export / "model.onnx", "slots", lambda text: text)
    session = gp.Session(export)
    session.use("a")
    assert off(session.run({"x": SAMPLE["x"].numpy()})["output"], deployed().want["a"]) < 1e-4
