"""ONNX export as a whole. The oracle is PyTorch, asked here again, past the exporter's own checks."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import zoo
from checks import Snapshot, randomize, same
from exports import (
    CLOSE,
    FAR,
    SAMPLE,
    adapted,
    arrays,
    deployed,
    hand,
    ids,
    off,
    running,
    silent,
    tiny,
    translated,
    unchanged,
)

import graphpeft as gp
from graphpeft.errors import AdapterError, ExportError
from graphpeft.passes.export import export
from graphpeft.rewrite.state import chains
from graphpeft.runtime.folder import staged
from graphpeft.runtime.session import Session


def answer(session: Session, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    return session.run(arrays(inputs))["logits"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Ranks 4 and 1, and an RLoRA whose pair has rank 48; `b` is active, partly frozen, and the model in training."""
    model = adapted("llama", "qv:lora(r=4, alpha=8)", "kq:lora(r=1); mlp:rlora(r=48)").train()
    for chain in chains(model, "b").values():
        next(chain.parameters()).requires_grad_(False)
    before = Snapshot.of(model)
    folder = tmp_path_factory.mktemp("llama") / "deploy"
    report = export(model, folder, share=True)
    training = all(module.training for module in model.modules())
    return SimpleNamespace(
        model=model, before=before, after=Snapshot.of(model), training=training, folder=folder, report=report
    )


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    model = adapted("gpt2", "q:lora(r=3); v:rlora(r=80)")
    folder = tmp_path_factory.mktemp("gpt2") / "deploy"
    export(model, folder, share=True, cache=False, verify="off")  # the test compares with PyTorch
    return SimpleNamespace(model=model, folder=folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    model = adapted("bert", "qv:lora(r=4); mlp:lora(r=2)", "k:lora")
    gp.activate(model, ["a", "b"])
    folder = tmp_path_factory.mktemp("bert") / "deploy"
    return SimpleNamespace(model=model, folder=folder, report=export(model, folder, merged=True))


# -- swappable -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "length", "left"), [(1, 1, 0), (1, 4, 0), (4, 9, 2)])
def test_one_session_serves_base_and_adapters_at_sizes_never_traced(
    llama: SimpleNamespace, batch: int, length: int, left: int
) -> None:
    session, inputs = Session(llama.folder), ids(batch, length, left)
    want = {name: running(llama.model.eval(), name, inputs) for name in (None, "a", "b")}
    assert all(off(want[name], want[None]) > FAR for name in "ab")
    for name in ("a", "b", None, "a", None, "b"):
        session.use(name)
        assert off(answer(session, inputs), want[name]) < CLOSE


def test_ranks_differ_by_site_and_adapter(llama: SimpleNamespace) -> None:
    ranks = {name: json.loads((llama.folder / f"{name}.json").read_text())["ranks"] for name in "ab"}
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    assert ranks["a"] == {f"{attention}.q_proj": 4, f"{attention}.v_proj": 4}
    wide = {f"{mlp}.{part}_proj": 48 for part in ("gate", "up", "down")}
    assert ranks["b"] == {f"{attention}.q_proj": 1, f"{attention}.k_proj": 1} | wide


def test_the_model_is_handed_back_as_it_was(llama: SimpleNamespace) -> None:
    assert same(llama.before.tensors.values(), llama.after.tensors.values())
    assert replace(llama.before, tensors={}) == replace(llama.after, tensors={})
    assert llama.training


def test_graph_is_the_base_graph_a_product_per_slot_and_one_per_site() -> None:
    kinds, base = (
        Counter(node.op_type for node in graph)
        for graph in (ir.load(deployed().folder / "model.onnx").graph, translated(tiny("hand"), SAMPLE).graph)
    )
    assert deployed().report.slots == 2
    assert kinds["MatMul"] == base["MatMul"] + 2
    assert kinds["Gemm"] == base["Gemm"] + 3
    around = {"Flatten", "Reshape", "Shape", "Concat"}  # activations as matrices, and back
    assert {kind for kind in kinds | base if kinds[kind] != base[kind]} <= around | {"MatMul", "Gemm"}
    assert sum(kinds[kind] - base[kind] for kind in around) <= 2 * 2 + 2 + 3


def test_slots_are_inline_optional_inputs_with_a_rank_symbol_of_their_own(llama: SimpleNamespace) -> None:
    model = ir.load(llama.folder / "model.onnx")
    slots = [value for value in model.graph.inputs if ".lora_" in value.name]
    symbols = [next(dim.value for dim in value.shape if not isinstance(dim, int)) for value in slots]
    sites = 6  # q, k and v share a slot, and so do gate and up
    assert len(set(symbols)) == llama.report.slots == 3
    assert len(slots) == llama.report.slots + sites
    for value in slots:
        assert model.graph.initializers[value.name] is value
        assert 0 in value.const_value.shape
        assert not isinstance(value.const_value, ir.ExternalTensor)


def test_the_file_names_weights_as_the_model_does_and_quotes_no_path(llama: SimpleNamespace) -> None:
    names = set(ir.load(llama.folder / "model.onnx").graph.initializers)
    # The exporter joins equal tensors, such as fresh norms.
    assert {name for name, parameter in tiny("llama").named_parameters() if parameter.ndim == 2} <= names
    binary = (llama.folder / "model.onnx").read_bytes()
    assert b"stack_trace" not in binary
    assert b"torch.export" not in binary
    assert str(Path(torch.__file__).parent).encode() not in binary


def test_metadata_states_schema_base_slots_and_special_tokens(llama: SimpleNamespace) -> None:
    found = ort.InferenceSession(llama.folder / "model.onnx", sess_options=silent()).get_modelmeta().custom_metadata_map
    assert found["graphpeft.schema"] == "2"
    assert found["graphpeft.base"] == json.loads((llama.folder / "a.json").read_text())["base"]
    slots = json.loads(found["graphpeft.slots"])
    assert len(slots) == llama.report.slots
    attention = "model.layers.0.self_attn."
    assert slots[0]["A"] == f"{attention}q_proj+k_proj+v_proj.lora_A.weight"
    assert slots[0]["sites"] == {f"{attention}q_proj": 64, f"{attention}v_proj": 32, f"{attention}k_proj": 32}
    assert json.loads(found["graphpeft.generation"]) == {"eos_token_id": [2]}


def test_fused_projection_has_one_slot_with_zeros_where_nothing_is_adapted(gpt2: SimpleNamespace) -> None:
    read = ort.AdapterFormat.read_adapter(str(gpt2.folder / "a.onnx_adapter"))
    found = {name: value.numpy().copy() for name, value in read.get_parameters().items()}
    a, b = (found[f"transformer.h.0.attn.c_attn.lora_{side}.weight"] for side in "AB")
    assert len(found) == 2
    assert a.shape == (64, 3 + 64)  # RLoRA's rank is cut to the order of its transforms
    assert b.shape == (3 + 64, 192)
    assert not b[:, 64:128].any()
    assert not b[:3, 128:].any()
    assert not b[3:, :64].any()
    assert np.abs(b[:3, :64]).min() > 0
    session = Session(gpt2.folder)
    session.use("a")
    assert off(answer(session, ids(3, 6)), running(gpt2.model, "a", ids(3, 6))) < CLOSE


# -- merged --------------------------------------------------------------------------------------------------------


def test_merged_graph_is_the_base_graph_node_for_node(bert: SimpleNamespace) -> None:
    base = ir.from_proto(ir.to_proto(translated(tiny("bert"))))  # files hold float attributes in fp32
    merged = ir.load(bert.folder / "model.onnx")
    assert described(merged) == described(base)
    weights = {name: value.const_value.numpy() for name, value in merged.graph.initializers.items()}
    moved = {n for n, v in base.graph.initializers.items() if not np.array_equal(v.const_value.numpy(), weights[n])}
    layer = "bert.encoder.layer.0."
    attention = {f"{layer}attention.self.{role}.weight" for role in ("query", "key", "value")}
    assert moved == attention | {f"{layer}{part}.dense.weight" for part in ("intermediate", "output")}


def test_merged_graph_answers_as_the_active_adapters_do(bert: SimpleNamespace) -> None:
    session, inputs = Session(bert.folder), ids(3, 9, right=2)
    assert session.adapters == ()
    assert off(answer(session, inputs), running(bert.model, ["a", "b"], inputs)) < CLOSE
    assert off(answer(session, inputs), running(bert.model, None, inputs)) > FAR
    assert bert.report.adapters == ("a", "b")


def test_a_merged_model_is_exported_and_stays_merged(tmp_path: Path) -> None:
    model = hand()
    want = model(SAMPLE["x"]).detach().numpy()
    gp.merge(model)
    before = Snapshot.of(model)
    export(model, tmp_path / "deploy", merged=True, inputs=SAMPLE)
    before.check(model)
    got = Session(tmp_path / "deploy").run({"x": SAMPLE["x"].numpy()})["output"]
    assert off(got, want) < CLOSE


# -- checks --------------------------------------------------------------------------------------------------------


def test_a_failed_check_leaves_the_old_export_and_a_good_one_replaces_it(tmp_path: Path) -> None:
    with staged(tmp_path / "deploy") as folder:
        (folder / "old.onnx_adapter").write_text("old")
        (folder / "graphpeft.json").write_text('{"adapters": ["old"], "files": {"old.onnx_adapter": 3}}')
    model = tiny("hand")
    gp.apply(model, "qv:lora", inputs=SAMPLE)
    before = Snapshot.of(model)
    with pytest.raises(ExportError, match=r"'default': it moves PyTorch's output by 0,.*never trained.*verify"):
        export(model, tmp_path / "deploy", inputs=SAMPLE)
    assert unchanged(before, model)
    assert [path.name for path in tmp_path.iterdir()] == ["deploy"]
    assert {path.name for path in (tmp_path / "deploy").iterdir()} == {"old.onnx_adapter", "graphpeft.json"}
    report = export(model, tmp_path / "deploy", inputs=SAMPLE, verify="fast")
    assert {check.test for check in report.checks} == {"numbers"}
    assert Session(tmp_path / "deploy").adapters == ("default",)  # the earlier export is gone as a whole


def test_an_adapter_that_onnx_runtime_drops_in_silence_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort.RunOptions, "add_active_adapter", lambda self, adapter: None, raising=False)
    with pytest.raises(ExportError, match=r"adapter 'a' .numbers., batch 2: output 'output' .* differs from PyTorch"):
        export(hand(), tmp_path / "deploy", inputs=SAMPLE)
    assert not list(tmp_path.iterdir())


def test_a_base_that_exports_otherwise_than_it_runs_is_caught(tmp_path: Path) -> None:
    class Branching(zoo.HandWritten):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.shape[0] < 3 else x  # torch.export keeps one branch and says nothing

    model = Branching().eval()
    gp.apply(model, "path(out):lora", inputs=SAMPLE)
    randomize(model)
    with pytest.raises(ExportError, match=r"base model .*, batch 3: output 'output' .* differs from PyTorch by"):
        export(model, tmp_path / "deploy", inputs=SAMPLE)
    assert not list(tmp_path.iterdir())


def test_sizes_that_the_model_itself_refuses_are_noted(tmp_path: Path) -> None:
    x = SAMPLE["x"]
    model = gp.apply(torch.export.export(tiny("hand"), (x,)), "v:lora", inputs=(x,))  # of a fixed batch size
    randomize(model)
    report = export(model, tmp_path / "deploy", inputs=(x,), verify="fast")
    assert [note.partition(": PyTorch")[0] for note in report.notes] == [
        "not checked at batch 1",
        "not checked at batch 3",
    ]


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verify": "some"}, 'one of "off", "fast", "full"'),
        ({"opset": 17}, "opset=17: torch.onnx writes 18 or later"),
        ({"adapters": []}, "No adapter is chosen"),
        ({"adapters": ["a"], "merged": True}, "takes no names"),
        ({"inputs": {"x": SAMPLE["x"][:1]}}, "batch size 1 .* unequal and at least 2"),
        ({"inputs": {"y": SAMPLE["x"]}}, "do not fit .*HandWritten.forward"),
    ],
    ids=["verify", "opset", "none", "names", "batch", "inputs"],
)
def test_refusals_state_the_rule_and_write_nothing(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    model = hand()
    before = Snapshot.of(model)
    with pytest.raises(ExportError, match=message):
        export(model, tmp_path / "deploy", **{"inputs": SAMPLE, **options})
    assert not list(tmp_path.iterdir())
    assert unchanged(before, model)


def test_models_without_an_adapter_to_export_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="has no adapters"):
        export(tiny("hand"), tmp_path / "deploy", inputs=SAMPLE)
    model = hand()
    with pytest.raises(AdapterError, match="no adapter 'z'"):
        export(model, tmp_path / "deploy", adapters="z", inputs=SAMPLE)
    gp.activate(model, None)
    with pytest.raises(ExportError, match=r"No adapter is active: call gp.activate"):
        export(model, tmp_path / "deploy", merged=True, inputs=SAMPLE)
    gp.apply(model, "k:lora", name="graphpeft", inputs=SAMPLE)
    with pytest.raises(ExportError, match="No adapter of an export can be called 'graphpeft'"):
        export(model, tmp_path / "deploy", inputs=SAMPLE)
    assert not list(tmp_path.iterdir())


def test_bfloat16_is_refused_with_the_remedy(tmp_path: Path) -> None:
    model = hand().to(torch.bfloat16)
    with pytest.raises(ExportError, match=r"weights in torch.bfloat16.*model.float\(\)"):
        export(model, tmp_path / "deploy", inputs={"x": SAMPLE["x"].bfloat16()})


# -- helpers -------------------------------------------------------------------------------------------------------


def described(model: ir.Model) -> list[Any]:
    def names(values: Any) -> list[str | None]:
        return [value and value.name for value in values]

    def attributes(node: ir.Node) -> list[str]:
        return sorted(map(str, node.attributes.values()))

    return [(n.domain, n.op_type, names(n.inputs), names(n.outputs), attributes(n)) for n in model.graph]


def test_a_merged_adapter_that_was_never_trained_is_refused(tmp_path: Path) -> None:
    model = gp.apply(tiny("hand"), "qv:lora(r=2)", inputs=SAMPLE)
    with pytest.raises(ExportError, match="it was never trained"):
        export(model, tmp_path / "deploy", merged=True, inputs=SAMPLE)
    assert not list(tmp_path.iterdir())
