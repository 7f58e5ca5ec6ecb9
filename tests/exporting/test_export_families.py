"""Every kind of model on ONNX Runtime: with rows, at sizes and paddings that were not traced, and merged node for node.

The exporter's own checks compare with PyTorch at 1e-4 of the largest value; here they are asked what they measured.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
import zoo
from checks import randomize
from torch import nn
from zoo import minilm

import graphpeft as gp
from graphpeft.exporting import onnx
from graphpeft.exporting.parts import parts


def qwen3() -> nn.Module:
    return zoo._decoder("Qwen3", num_key_value_heads=2, head_dim=16)("sdpa")


def bert() -> nn.Module:
    return zoo._classifier("Bert", **zoo.BERT)("sdpa")


BUILD = {
    "llama": zoo.llama, "gpt2": zoo.gpt2, "bert": bert, "t5": zoo.t5, "whisper": zoo.whisper, "vit": zoo.vit,
    "qwen3": qwen3, "minilm": minilm,
}  # fmt: skip
SLOW = ("llama", "bert", "t5", "whisper", "vit", "qwen3", "minilm")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in BUILD])
def test_base_adapters_swaps_and_rows_do_what_pytorch_does(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BUILD[name]().eval()
    for seed, (label, rules) in enumerate({"a": "qv:lora(r=4)", "b": "qkv:lora(r=2); mlp:rlora(r=3)"}.items()):
        gp.apply(model, rules, name=label, verify="off")
        randomize(model, label, seed=seed)
    report = gp.export(model, tmp_path / "deploy", per_row=True, share=True)
    figures = {(check.test, check.subject): check for check in report.checks}
    assert {test for test, _ in figures} == {"slots", "numbers", "effect", "swap", "rows"}
    assert {"adapter 'a'", "adapter 'b'", "base model"} <= {subject for _, subject in figures}
    assert all(check.value <= 1e-4 for check in report.checks if not check.least)
    assert all(check.value >= check.limit for check in report.checks if check.least)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_merged_graph_is_the_base_graph(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BUILD[name]().eval()
    with torch.no_grad():
        base = {part: _nodes(onnx.translate(flat.module(), flat.inputs, flat.outputs, [*flat.axes.values()]))
                for part, flat in parts(model)}  # fmt: skip
    gp.apply(model, "qv:lora(r=4); mlp:rlora(r=4)")
    randomize(model, "default", seed=0)
    gp.export(model, tmp_path / "merged", merged=True)
    for part, nodes in base.items():
        assert _nodes(ir.load(tmp_path / "merged" / f"{part}.onnx")) == nodes


def _nodes(model: ir.Model) -> list[tuple[str, Counter[str]]]:
    """Kinds of nodes in order, with their attributes."""
    stored = ir.from_proto(ir.to_proto(model))  # an epsilon of 1e-5 is rounded in a file
    return [(node.op_type, Counter(map(str, node.attributes.values()))) for node in stored.graph]
