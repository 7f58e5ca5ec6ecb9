"""Nodes of an export say where they belong: what viewers group them by."""

from __future__ import annotations

import ast
from pathlib import Path

import onnx
import pytest
from torch import nn
from zoo import gpt2, llama

import graphpeft as gp
from graphpeft.onnx.tags import ADAPTER, SCOPES, SITE


@pytest.mark.parametrize("options", [{}, {"share": True, "rows": True}, {"quantize": "int8"}])
def test_what_reads_a_slot_names_its_site_and_its_module(options: dict[str, object], tmp_path: Path) -> None:
    model = gp.apply(llama().eval(), "qv:lora; down:lora(r=2)")
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        nn.init.normal_(parameter, std=0.2)
    gp.export(model, tmp_path / "out", verify="off", **options)  # type: ignore[arg-type]
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    slots = {value.name for value in graph.input if ".lora_A" in value.name or ".lora_B" in value.name}
    readers = [node for node in graph.node if slots & set(node.input)]
    assert len(readers) >= len(slots)
    for node in readers:
        props = {each.key: each.value for each in node.metadata_props}
        (slot,) = slots & set(node.input)
        assert slot.partition(".lora_")[0] == props[SITE]
        assert props[ADAPTER] == "slot"
        assert SCOPES in props
    nameless = [node.name for node in graph.node if SCOPES not in {each.key for each in node.metadata_props}]
    assert len(nameless) < 0.3 * len(graph.node)  # constants of shapes, and what torch made without a module


def test_modules_of_the_model_are_found_in_the_graph(tmp_path: Path) -> None:
    model = gpt2().eval()
    gp.apply(model, "v:lora")
    gp.export(model, tmp_path / "out", verify="off")
    graph = gp.to_networkx(tmp_path / "out")
    paths = {about["path"] for _, about in graph.nodes(data=True) if about["kind"] == "op" and "path" in about}
    assert "transformer.h.1.attn.c_attn" in paths
    assert paths - {""} <= {*dict(model.named_modules())}
    nodes = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.node
    scopes = [each.value for node in nodes for each in node.metadata_props if each.key == SCOPES]
    assert all(isinstance(ast.literal_eval(text), list) for text in scopes)
