"""Diffs: of a model with its base, of snapshots around passes, of ONNX files. What they count is counted otherwise too."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from exports import SAMPLE, hand
from torch import nn
from zoo import gpt2, llama, mixtral, torch_encoder

import graphpeft as gp
from graphpeft.errors import CaptureError, FileError

GPT2_DIFF = """\
transformer.h.*.attn.c_attn
 %view_1 = view(%layer_norm_2, [-1, 64])
 %addmm_3 = addmm(bias, %view_1, weight)
-%view_4 = view(%addmm_3, [2, 7, 192])
+%reshape_5 = reshape(%view_1, -1, 64)
+%linear_6 = linear(%reshape_5, default.v[2].weight)
+%pad_7 = pad(default.v[1].weight, [0, 0, 128, 0], mode=constant, value=None)
+%reshape_8 = reshape(%addmm_3, -1, 192)
+%t_9 = t(%pad_7)
+%addmm_10 = addmm(%reshape_8, %linear_6, %t_9, alpha=1.0)
+%view_as_11 = view_as(%addmm_10, %addmm_3)
+%view_4 = view(%view_as_11, [2, 7, 192])
  × 2, layers 0-1"""


def trained(model: nn.Module) -> nn.Module:
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        nn.init.normal_(parameter, std=0.2)
    return model


def test_a_fused_projection_is_shown_once_for_all_layers() -> None:
    shown = str(gp.diff(gp.apply(gpt2(), "v:lora")))
    assert GPT2_DIFF in shown
    assert shown.count("× 2, layers 0-1") == 3  # two tensors, and the lines


def test_a_whole_graph_is_folded_too() -> None:
    model = gpt2().eval()
    tokens = torch.randint(3, 100, (2, 7))
    exported = torch.export.export(model, (), {"input_ids": tokens, "use_cache": False}, strict=False)
    diff = gp.diff(gp.apply(exported, "qv:lora"))
    assert len([hunk for hunk in diff.hunks if hunk.path.endswith("c_attn")]) == 1
    assert all(hunk.layers == (0, 1) for hunk in diff.hunks)


def test_the_weight_form() -> None:
    model = torch_encoder()
    example = torch.randn(2, 7, 32)
    gp.apply(model, "q:lora", inputs=example)
    diff = gp.diff(model)  # by the example that apply was given
    assert diff.operators == {"added": (2, 0), "delta": (2, 0)}
    (hunk, *_) = diff.hunks
    assert hunk.path == "layers.*.self_attn"
    assert "+%added_2 = added(in_proj_weight, %delta_1, False)" in hunk.lines


@pytest.mark.parametrize(
    ("make", "rules"), [(llama, "linear:dora"), (mixtral, "experts+attn:lora"), (gpt2, "qv:blora")]
)
def test_parameters_are_those_that_train(make: type[nn.Module], rules: str) -> None:
    model = gp.apply(make(), rules)
    diff = gp.diff(model)
    assert sum(p.numbers for p in diff.parameters) == gp.trainable(model)[0]
    assert {p.change for p in diff.parameters} == {"added"}


def test_nothing_runs_nothing_shows_and_the_model_stays_as_it_was() -> None:
    model = gp.apply(llama(), "qv:lora")
    classes = [type(m) for m in model.modules()]
    assert gp.diff(model)
    assert [type(m) for m in model.modules()] == classes
    gp.activate(model, None)
    assert not gp.diff(model)
    assert str(gp.diff(model)) == ""


def test_snapshots_around_passes() -> None:
    model = llama().eval()
    base = gp.to_networkx(model, values=True)
    trained(gp.apply(model, "qv:blora"))
    before = gp.to_networkx(model, values=True)
    assert str(gp.diff(base, model)).splitlines()[1:] == str(gp.diff(model)).splitlines()[1:]
    gp.lower(model)
    lowered = gp.diff(before, model)
    counts = [
        Counter(a["op"] for _, a in g.nodes(data=True) if a["kind"] == "op") for g in (before, gp.to_networkx(model))
    ]
    change = {op: counts[1][op] - counts[0][op] for op in {*counts[0], *counts[1]} if counts[1][op] != counts[0][op]}
    assert {op: added - removed for op, (added, removed) in lowered.operators.items()} == change
    assert change
    gp.merge(model)
    merged = gp.diff(base, model)
    assert merged.operators == {}
    assert merged.hunks == ()
    assert {(p.change, p.name.split(".")[-2], p.layers) for p in merged.parameters} == {
        ("changed", "q_proj", (0, 1)),
        ("changed", "v_proj", (0, 1)),
    }
    gp.unmerge(model)
    gp.remove(model)
    assert not gp.diff(base, model)


def test_one_layer_that_differs_is_named() -> None:
    model = gp.apply(llama(layers=3), "q[layers=1]:lora")
    diff = gp.diff(model)
    assert {hunk.layers for hunk in diff.hunks} == {(1,)}
    assert "\n  layer 1" in str(diff)


def test_onnx_graphs(tmp_path: Path) -> None:
    model = trained(hand("qv:lora"))
    gp.export(model, tmp_path / "slots", inputs=SAMPLE, verify="off")
    gp.export(model, tmp_path / "merged", inputs=SAMPLE, merged=True, verify="off")
    assert not gp.diff(tmp_path / "merged", tmp_path / "merged" / "model.onnx")
    diff = gp.diff(tmp_path / "merged", tmp_path / "slots")
    assert diff.operators["Gemm"] == (2, 0)
    assert {p.name for p in diff.parameters} == {"wq", "wv"}
    assert any(re.search(r"Gemm\(%MatMul_\d+, lora_B.weight,", line) for hunk in diff.hunks for line in hunk.lines)
    assert json.loads(json.dumps(diff.as_dict()))["operators"]["Gemm"] == [2, 0]


def test_what_has_no_graph(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="A dict has no graph"):
        gp.diff({}, {})
    with pytest.raises(FileError, match=r"has no \.onnx file"):
        gp.diff(tmp_path, tmp_path)
    with pytest.raises(FileError, match="cannot be read as an ONNX graph"):
        gp.diff(tmp_path / "none.onnx", llama())
    (tmp_path / "cut.onnx").write_bytes(b"\x08\x0a:")
    with pytest.raises(FileError, match="cannot be read as an ONNX graph"):
        gp.diff(tmp_path / "cut.onnx", llama())
    with pytest.raises(CaptureError):
        gp.diff(nn.Linear(3, 3), llama())
