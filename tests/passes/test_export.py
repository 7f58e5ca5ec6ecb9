"""ONNX export: graphs, files and checks. The oracle is PyTorch, asked here again, past the exporter's own checks."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
from torch import nn

import graphpeft as gp
from graphpeft import onnx, parity
from graphpeft.deploy import staged
from graphpeft.errors import AdapterError, ExportError
from graphpeft.flat import Flat
from graphpeft.passes.export import export
from graphpeft.runtime import Session
from graphpeft.slots import Slot, SlotBranch, inserted
from graphpeft.state import chains

CLOSE = 2e-6
"""fp32 sums of 64 to 256 terms in another order: measured up to 7e-7 on these models."""
FAR = 1e-2
"""Random adapters move these models' outputs by 0.1 and more."""


def tiny(name: str) -> nn.Module:
    torch.manual_seed(0)
    one = {"llama": lambda: zoo.llama(layers=1), "gpt2": lambda: zoo.gpt2(n_layer=1), "hand": zoo.HandWritten}
    if name in one:
        return one[name]().eval()
    model = zoo._classifier("Bert", num_hidden_layers=1, **zoo.BERT)("sdpa").eval()
    nn.init.normal_(model.classifier.weight, std=1.0)  # fresh ones scale every output, and every effect, down
    return model


def adapted(name: str, *rules: str, **options: Any) -> nn.Module:
    """A tiny model with adapters "a", "b", ... of random numbers; the last one is active."""
    model = tiny(name)
    for seed, (label, rule) in enumerate(zip("abc", rules, strict=False)):
        gp.apply(model, rule, name=label, **options)
        randomize(model, label, seed=seed)
    return model


def hand(*rules: str) -> nn.Module:
    return adapted("hand", *(rules or ("qv:lora(r=2)",)), inputs=SAMPLE)


SAMPLE = {"x": torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(7))}


def ids(batch: int, length: int, padded: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length - 2 :] = 0 if padded else 1
    return {"input_ids": torch.randint(3, zoo.VOCAB, (batch, length), generator=generator), "attention_mask": mask}


def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(**inputs).logits.numpy()


def answer(session: Session, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    return session.run({name: tensor.numpy() for name, tensor in inputs.items()})["logits"]


def off(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return float(np.abs(got - want).max())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Ranks 4 and 1, and an RLoRA whose pair has rank 48; `b` is active, partly frozen, and the model in training."""
    model = adapted("llama", "qv:lora(r=4, alpha=8)", "kq:lora(r=1); mlp:rlora(r=48)").train()
    for chain in chains(model, "b").values():
        next(chain.parameters()).requires_grad_(False)
    before = Snapshot.of(model)
    folder = tmp_path_factory.mktemp("llama") / "deploy"
    report = export(model, folder)
    training = all(module.training for module in model.modules())
    return SimpleNamespace(
        model=model, before=before, after=Snapshot.of(model), training=training, folder=folder, report=report
    )


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    model = adapted("gpt2", "q:lora(r=3); v:rlora(r=80)")
    folder = tmp_path_factory.mktemp("gpt2") / "deploy"
    return SimpleNamespace(model=model, folder=folder, report=export(model, folder))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    model = adapted("bert", "qv:lora(r=4); mlp:lora(r=2)", "k:lora")
    gp.activate(model, ["a", "b"])
    folder = tmp_path_factory.mktemp("bert") / "deploy"
    return SimpleNamespace(model=model, folder=folder, report=export(model, folder, merged=True))


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The smallest swappable export."""
    model, folder = hand(), tmp_path_factory.mktemp("hand") / "deploy"
    return SimpleNamespace(model=model, folder=folder, report=export(model, folder, inputs=SAMPLE))


# -- swappable -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "length", "padded"), [(1, 1, False), (1, 4, False), (4, 9, True)])
def test_one_session_serves_base_and_adapters_at_sizes_never_traced(
    llama: SimpleNamespace, batch: int, length: int, padded: bool
) -> None:
    session, inputs = Session(llama.folder), ids(batch, length, padded)
    with gp.disabled(llama.model):
        base = logits(llama.model, inputs)
    want = {None: base}
    for name in ("a", "b"):
        gp.activate(llama.model, name)
        want[name] = logits(llama.model, inputs)
        assert off(want[name], base) > FAR
    for name in ("a", "b", None, "a", None, "b"):
        session.use(name)
        assert off(answer(session, inputs), want[name]) < CLOSE


def test_ranks_differ_by_site_and_adapter(llama: SimpleNamespace) -> None:
    ranks = {name: json.loads((llama.folder / f"{name}.json").read_text())["ranks"] for name in "ab"}
    layer = "model.layers.0."
    assert ranks["a"] == {f"{layer}self_attn.q_proj": 4, f"{layer}self_attn.v_proj": 4}
    assert ranks["b"] == {f"{layer}self_attn.{p}_proj": 1 for p in "qk"} | {f"{layer}mlp.{p}_proj": 48 for p in ("gate", "up", "down")}


def test_the_model_is_handed_back_as_it_was(llama: SimpleNamespace) -> None:
    assert same(llama.before.tensors.values(), llama.after.tensors.values())
    assert replace(llama.before, tensors={}) == replace(llama.after, tensors={})
    assert llama.training


def test_graph_is_the_base_graph_and_three_nodes_per_slot(llama: SimpleNamespace) -> None:
    graph = ir.load(llama.folder / "model.onnx").graph
    base = translated(tiny("llama")).graph
    assert len(graph) == len(base) + 3 * llama.report.slots
    assert llama.report.slots == 6


def test_slots_are_inline_optional_inputs_with_a_rank_symbol_of_their_own(llama: SimpleNamespace) -> None:
    model = ir.load(llama.folder / "model.onnx")
    slots = [value for value in model.graph.inputs if ".lora_" in value.name]
    symbols = [next(dim.value for dim in value.shape if not isinstance(dim, int)) for value in slots]
    assert len(set(symbols)) == llama.report.slots == len(slots) / 2
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
    assert str(Path(torch.__file__).parent).encode() not in binary


def test_metadata_states_schema_base_slots_and_measured_tolerance(llama: SimpleNamespace) -> None:
    found = ort.InferenceSession(llama.folder / "model.onnx", sess_options=silent()).get_modelmeta().custom_metadata_map
    assert found["graphpeft.schema"] == "1"
    assert found["graphpeft.base"] == json.loads((llama.folder / "a.json").read_text())["base"]
    slots = json.loads(found["graphpeft.slots"])
    assert len(slots) == llama.report.slots
    assert slots[0]["A"] == f"{slots[0]['site']}.lora_A.weight"
    assert 0 < float(found["graphpeft.tolerance"]) < CLOSE


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
    assert off(answer(session, ids(3, 6)), logits(gpt2.model, ids(3, 6))) < CLOSE


# -- merged --------------------------------------------------------------------------------------------------------


def test_merged_graph_is_the_base_graph_node_for_node(bert: SimpleNamespace) -> None:
    base = translated(tiny("bert"))
    merged = ir.load(bert.folder / "model.onnx")
    assert described(merged) == described(base)
    weights = {name: value.const_value.numpy() for name, value in merged.graph.initializers.items()}
    moved = {n for n, v in base.graph.initializers.items() if not np.array_equal(v.const_value.numpy(), weights[n])}
    layer = "bert.encoder.layer.0."
    attention = {f"{layer}attention.self.{role}.weight" for role in ("query", "key", "value")}
    assert moved == attention | {f"{layer}{part}.dense.weight" for part in ("intermediate", "output")}


def test_merged_graph_answers_as_the_active_adapters_do(bert: SimpleNamespace) -> None:
    session, inputs = Session(bert.folder), ids(3, 9, padded=True)
    assert session.adapters == ()
    assert off(answer(session, inputs), logits(bert.model, inputs)) < CLOSE
    with gp.disabled(bert.model):
        assert off(answer(session, inputs), logits(bert.model, inputs)) > FAR
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


# -- files ---------------------------------------------------------------------------------------------------------


def test_report_is_printed_and_saved_with_every_figure(deployed: SimpleNamespace) -> None:
    report = deployed.report
    saved = json.loads((deployed.folder / "graphpeft.json").read_text())
    assert [check["test"] for check in saved["checks"]] == ["slots", "numbers", "numbers", "effect", "swap"]
    assert all(c.value >= c.limit if c.least else c.value <= c.limit for c in report.checks)
    assert {p.name for p in deployed.folder.iterdir()} == {*saved["files"], "graphpeft.json"}
    assert set(saved["files"]) == {"model.onnx", "model.onnx.data", "a.onnx_adapter", "a.json"}
    assert str(deployed.folder) not in json.dumps(saved)
    text = str(report)
    assert "swap     a > base > a" in text
    assert "2 slots" in text


def test_an_earlier_export_is_replaced_as_a_whole(tmp_path: Path) -> None:
    export(hand("q:lora", "k:lora"), tmp_path / "deploy", inputs=SAMPLE, verify="off")
    report = export(hand("q:lora"), tmp_path / "deploy", inputs=SAMPLE, verify="fast")
    assert Session(tmp_path / "deploy").adapters == ("a",)
    assert {check.test for check in report.checks} == {"numbers"}
    assert [path.name for path in tmp_path.iterdir()] == ["deploy"]


def test_a_folder_with_anything_else_is_refused_and_untouched(tmp_path: Path) -> None:
    def refused(match: str) -> None:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(ExportError, match=match), staged(tmp_path / "deploy"):
            pass
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    (tmp_path / "deploy").write_text("a file")
    refused("this is a file")
    (tmp_path / "deploy").unlink()
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "thesis.tex").write_text("years of work")
    refused("no export of graphpeft wrote it")
    (tmp_path / "deploy" / "graphpeft.json").write_text('{"files": {"model.onnx": 1}}')
    refused("'thesis.tex' is not of it")


def test_a_failed_check_leaves_no_file_and_the_old_folder(tmp_path: Path) -> None:
    with staged(tmp_path / "deploy") as folder:
        (folder / "graphpeft.json").write_text('{"files": {}}')
    model = tiny("hand")
    gp.apply(model, "qv:lora", inputs=SAMPLE)
    before = Snapshot.of(model)
    with pytest.raises(ExportError, match=r"adapter 'default': it moves PyTorch's output by 0,.*never trained.*verify=\"fast\""):
        export(model, tmp_path / "deploy", inputs=SAMPLE)
    before.check(model)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["deploy", "deploy/graphpeft.json"]
    export(model, tmp_path / "deploy", inputs=SAMPLE, verify="fast")
    assert Session(tmp_path / "deploy").adapters == ("default",)


# -- checks that catch what ONNX Runtime does not say --------------------------------------------------------------


def test_an_adapter_that_onnx_runtime_drops_in_silence_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort.RunOptions, "add_active_adapter", lambda self, adapter: None, raising=False)
    with pytest.raises(ExportError, match="adapter 'a' .numbers., batch 2: output 'output' .* differs from PyTorch"):
        export(hand(), tmp_path / "deploy", inputs=SAMPLE)
    assert not list(tmp_path.iterdir())


def test_a_base_that_exports_otherwise_than_it_runs_is_caught(tmp_path: Path) -> None:
    class Sly(zoo.HandWritten):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.bump(x)

        def bump(self, x: torch.Tensor) -> torch.Tensor:
            return Bump()(x)

    model = Sly().eval()
    gp.apply(model, "path(out):lora", inputs=SAMPLE)
    randomize(model)
    with pytest.raises(ExportError, match="base model .* differs from PyTorch by"):
        export(model, tmp_path / "deploy", inputs=SAMPLE)


class Bump(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if torch.compiler.is_exporting() else x


def test_a_slot_that_does_nothing_is_named(deployed: SimpleNamespace) -> None:
    session, flat = Session(deployed.folder), Flat.of(deployed.model, SAMPLE)
    slots = [Slot(site, 32, 32, f"rank_{i}") for i, site in enumerate(("wq", "wv"))]
    like = {name: torch.zeros(1) for slot in slots for name in (slot.a, slot.b)}
    branches = {site: SlotBranch(slot, site_weight) for site, slot, site_weight in matched(deployed.model, slots)}

    with inserted(deployed.model, branches):
        module = flat.module([f"adapters.0.{site.weight}_slot.{side}" for site in branches for side in "AB"])

        def reference(inputs: parity.Tensors, fed: parity.Tensors, deaf: str = "") -> parity.Outputs:
            tensors = [fed[n] * (0 if n.startswith(deaf + ".") else 1) for s in slots for n in (s.a, s.b)]
            with torch.no_grad():
                return {"output": module(*inputs.values(), *tensors)[0].numpy()}

        case = parity.Case("batch 2", SAMPLE)
        check, unmoved = parity.check_slots(session, reference, slots, case, like, 1e-4)
        assert check.value < CLOSE
        assert unmoved == []
        with pytest.raises(ExportError, match="wv: a pair fed to this slot alone"):
            parity.check_slots(session, lambda i, f: reference(i, f, "wv"), slots, case, like, 1e-4)


def matched(model: nn.Module, slots: list[Slot]) -> Iterator[tuple[Any, Slot, torch.Tensor]]:
    for site in chains(model, "a"):
        slot = next(slot for slot in slots if slot.site == site.weight)
        yield site, slot, model.get_parameter(site.weight)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda g, a: g.inputs.remove(a), "wq: .* the input wq.lora_A.weight is gone"),
        (lambda g, a: g.inputs.append(a), "lists an input twice"),
        (lambda g, a: setattr(a, "shape", ir.Shape((32, "rank_1"))), r"wq: .* has shape \[32, rank_1\]|wq: .* has shape"),
        (lambda g, a: reader(a).replace_input_with(1, g.inputs[-1]), "wq: .* nothing reads wq.lora_A.weight"),
        (lambda g, a: setattr(reader(a), "op_type", "Gemm"), "wq: .* goes into Gemm instead of MatMul"),
        (lambda g, a: setattr(reader(a).outputs[0], "shape", ir.Shape(("batch", 5, 2))), "wq: .* a fixed rank"),
    ],
    ids=["dropped", "doubled", "shared rank", "unread", "fused", "stale rank"],
)
def test_census_finds_damaged_slots(deployed: SimpleNamespace, damage: Any, message: str) -> None:
    model = ir.load(deployed.folder / "model.onnx")
    slots = [Slot(site, 32, 32, f"rank_{i}") for i, site in enumerate(("wq", "wv"))]
    onnx.census(model, slots)
    damage(model.graph, next(value for value in model.graph.inputs if value.name == "wq.lora_A.weight"))
    with pytest.raises(ExportError, match=message):
        onnx.census(model, slots)


def reader(value: ir.Value) -> ir.Node:
    return next(iter(value.uses())).node


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verify": "some"}, 'one of "off", "fast", "full"'),
        ({"opset": 17}, "opset=17: torch.onnx writes 18 or later"),
        ({"adapters": []}, "No adapter is chosen"),
        ({"adapters": ["a"], "merged": True}, "takes no names"),
        ({"inputs": {"x": SAMPLE["x"][:1]}}, "batch size 1 .* unequal and at least 2"),
        ({"inputs": {"y": SAMPLE["x"]}}, "do not fit HandWritten.forward"),
    ],
    ids=["verify", "opset", "none", "names", "batch", "inputs"],
)
def test_refusals_state_the_rule_and_write_nothing(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    model = hand()
    before = Snapshot.of(model)
    with pytest.raises(ExportError, match=message):
        export(model, tmp_path / "deploy", **{"inputs": SAMPLE, **options})
    assert not list(tmp_path.iterdir())
    before.check(model)


def test_equal_sizes_of_batch_and_sequence_are_refused() -> None:
    with pytest.raises(ExportError, match=r"batch size 4 and lengths \[4\]"):
        Flat.of(tiny("bert"), ids(4, 4))


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
    with pytest.raises(ExportError, match="No adapter can be called 'graphpeft'"):
        export(model, tmp_path / "deploy", inputs=SAMPLE)
    assert not list(tmp_path.iterdir())


def test_bfloat16_is_refused_with_the_remedy(tmp_path: Path) -> None:
    model = hand().to(torch.bfloat16)
    with pytest.raises(ExportError, match=r"weights in torch.bfloat16.*model.float\(\)"):
        export(model, tmp_path / "deploy", inputs={"x": SAMPLE["x"].bfloat16()})


def test_a_model_that_torch_cannot_translate_is_explained(tmp_path: Path) -> None:
    class Branching(zoo.HandWritten):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.shape[0] < 3 else x

    model = Branching().eval()
    gp.apply(model, "path(out):lora", inputs=SAMPLE)
    randomize(model)
    with pytest.raises(ExportError, match="torch.onnx cannot translate the model: .*batch"):
        export(model, tmp_path / "deploy", inputs=SAMPLE)
    assert not list(tmp_path.iterdir())


def test_outputs_must_be_tensors() -> None:
    class Nested(nn.Module):
        def __init__(self, *kinds: str) -> None:
            super().__init__()
            self.kinds = kinds

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {kind: x if kind == "plain" else (x,) for kind in self.kinds}

    flat = Flat.of(Nested("plain", "cache"), SAMPLE)
    assert (flat.outputs, flat.dropped) == (("plain",), ("cache",))
    with pytest.raises(ExportError, match="Nested returns no tensor"):
        Flat.of(Nested("cache"), SAMPLE)


# -- helpers -------------------------------------------------------------------------------------------------------


def translated(model: nn.Module) -> ir.Model:
    """The base model's graph by the same translation."""
    flat = Flat.of(model)
    with torch.no_grad():
        return onnx.translate(flat.module(), flat.inputs, flat.outputs, [flat.axes[name] for name in flat.inputs], None)


def described(model: ir.Model) -> list[Any]:
    return [
        (n.domain, n.op_type, [i and i.name for i in n.inputs], [o.name for o in n.outputs], sorted(map(str, n.attributes.values())))
        for n in model.graph
    ]  # fmt: skip


def silent() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return options
