"""Nodes of an export say where they belong: what viewers group them by."""

from __future__ import annotations

import ast
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
from torch import nn
from zoo import gpt2, llama

import graphpeft as gp
from graphpeft.exporting.onnx.tags import ADAPTER, SCOPES, SITE


def adapted(make: Any, rules: str) -> nn.Module:
    model = gp.apply(make().eval(), rules)
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize(
    ("make", "rules", "options"),
    [
        (partial(gpt2, n_layer=1), "v:lora; down:lora(r=2)", {}),
        pytest.param(
            llama,
            "qv:lora; down:lora(r=2)",
            {"share": True, "rows": True, "quantize": "int8"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_nodes_name_their_modules_and_what_reads_a_slot_its_site(
    make: Any, rules: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = adapted(make, rules)
    gp.export(model, tmp_path / "out", verify="off", **options)
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    slots = {value.name for value in graph.input if ".lora_A" in value.name or ".lora_B" in value.name}
    readers = [node for node in graph.node if slots & set(node.input)]
    assert len(readers) >= len(slots)
    for node in readers:
        props = {each.key: each.value for each in node.metadata_props}
        (slot,) = slots & set(node.input)
        assert slot.partition(".lora_")[0] == props[SITE]
        assert props[ADAPTER] == "slot"
        assert isinstance(ast.literal_eval(props[SCOPES]), list)
    nameless = [node.name for node in graph.node if SCOPES not in {each.key for each in node.metadata_props}]
    assert len(nameless) < 0.3 * len(graph.node)  # constants of shapes, and what torch made without a module
    drawn = gp.to_networkx(tmp_path / "out")
    paths = {about["path"] for _, about in drawn.nodes(data=True) if about["kind"] == "op" and "path" in about}
    assert {entry.site.owner for entry in gp.plan(make(), rules).entries} <= paths
