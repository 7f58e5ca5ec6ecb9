"""Traps that graph rewriters fall into, each with a test; the numbers are those of a list made from other tools' bugs.

Not here, because they cannot occur: 14, a residual that a wrapper reads after a cast, and 17, blocks that cannot be cut
out. Nothing is wrapped or cut: a branch is added behind one projection, whose inputs stay what they were.
"""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from checks import adapters, build, call, delta, outputs, randomize, same
from expected_roles import expected
from torch import Tensor, fx, nn
from torch.nn import functional as F
from zoo import ZOO, gpt2, llama

import graphpeft as gp
from graphpeft.capturing.capture import as_module, capture
from graphpeft.capturing.normalize import normalize
from graphpeft.capturing.samples import sample_inputs
from graphpeft.errors import CaptureError, MatchError
from graphpeft.match.products import op
from graphpeft.rewrite.graph import CHECKS

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


class Block(nn.Module):
    """Attention and MLP with every kind of operator that depends on the mode."""

    def __init__(self, keyword: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.up, self.down = (nn.Linear(16, 16) for _ in range(6))
        self.norm, self.drop, self.keyword = nn.BatchNorm1d(16), nn.Dropout(0.3), keyword

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        p = 0.25 if self.training else 0.0
        if self.keyword:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        else:
            y = F.scaled_dot_product_attention(q, k, v, None, p)
        x = x + self.o(y.transpose(1, 2).flatten(-2))
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return x + self.drop(self.down(F.relu(self.up(x).to(x.dtype))))


X = torch.randn(2, 5, 16)


def whole(model: nn.Module | None = None, training: bool = True, **options: Any) -> fx.GraphModule:
    """A graph module of torch.export, dynamic in the batch."""
    model = (Block() if model is None else model).train(training)
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    return as_module(torch.export.export(model, (X,), dynamic_shapes=shapes, **options))


def run(model: nn.Module, x: Tensor = X) -> list[Tensor]:
    return outputs(model, ((x,), {}))


def test_trap_01_two_matches_do_not_share_an_adapter() -> None:
    for model in (build("llama"), whole(nn.Sequential(Block(), Block()))):
        gp.apply(model, "qkv:lora")
        found = adapters(model)
        assert len({p.data_ptr() for p in found.values()}) == len(found) == 2 * 3 * 2


def test_trap_02_inserted_nodes_carry_their_place() -> None:
    model = gp.apply(whole(), "qv:lora; up:rlora")
    inserted = [n for n in model.graph.nodes if "graphpeft" in n.meta]
    assert {n.meta["graphpeft"].rpartition(".")[2] for n in inserted} == {"q_q", "v_v", "up_up"}
    assert all(n.meta["nn_module_stack"] for n in inserted)
    # The shape that the meta data promise is the shape that comes out.
    real: dict[str, torch.Size] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            real[n.name] = getattr(value, "shape", None)
            return value

    with torch.no_grad():
        Recorder(model).run(X)
    assert len(inserted) > 10
    numbers = [n for n in inserted if str(n.target).endswith(".multiplier")]
    assert len(numbers) == 3
    inserted = [n for n in inserted if n not in numbers]
    assert {n.name: n.meta["val"].shape for n in inserted} == {n.name: real[n.name] for n in inserted}


def test_trap_03_a_bias_is_optional() -> None:
    with_bias = llama(attention_bias=True, mlp_bias=True)
    assert with_bias.model.layers[0].self_attn.q_proj.bias is not None
    found = [(s.role, s.weight) for s in gp.sites(with_bias)]
    assert sorted(found) == sorted((role, weight) for role, weight, _ in expected("llama"))


@pytest.mark.parametrize("keyword", [True, False])
def test_trap_04_modes_switch_flags_and_keep_probabilities(keyword: bool) -> None:
    model = whole(Block(keyword))
    exported = copy.deepcopy(model.graph)
    gp.apply(model, "qv:lora", inputs=(X,))

    def literals(graph: fx.Graph) -> list[Any]:
        kinds = {"dropout", "scaled_dot_product_attention", "batch_norm"}
        found = [n for n in graph.nodes if op(n) in kinds]
        plain = lambda values: [v for v in values if not isinstance(v, fx.Node)]  # noqa: E731
        return [(op(n), plain(n.args), plain(n.kwargs.values())) for n in found]

    start = literals(exported)
    assert {name for name, *_ in start} == {"dropout", "scaled_dot_product_attention", "batch_norm"}
    model.eval()
    asleep = literals(model.graph)
    assert asleep != start
    assert "0.25" not in str(asleep)
    assert "0.3" in str(asleep)
    assert "True" not in str([entry for entry in asleep if entry[0] == "dropout"])
    mean = model.norm.running_mean.clone()
    assert same(run(model), run(model))
    assert torch.equal(model.norm.running_mean, mean)
    model.train()
    assert literals(model.graph) == start
    assert not same(run(model), run(model))
    assert not torch.equal(model.norm.running_mean, mean)


def test_trap_05_no_dropout_is_left_in_an_onnx_graph(tmp_path: Path) -> None:
    model = gp.apply(gpt2(n_layer=1).train(), "qv:lora(dropout=0.2)")
    gp.export(model, tmp_path / "out", verify="off")
    kinds = {node.op_type for node in onnx.load(tmp_path / "out/model.onnx", load_external_data=False).graph.node}
    assert "MatMul" in kinds
    assert "Dropout" not in kinds
    assert model.training, "the export has to give the mode back"


def test_trap_06_guards_are_no_module_to_adapt() -> None:
    exported = torch.export.export(Block().eval(), (X,))
    guarded = exported.module()
    assert any(n.target == "_guards_fn" for n in guarded.graph.nodes)
    code = guarded.code
    gp.apply(guarded, "qv:lora")
    randomize(guarded)
    assert not any(n.target == "_guards_fn" for n in guarded.graph.nodes)
    run(guarded, torch.randn(2, 5, 16))
    gp.remove(guarded)
    assert guarded.code == code


def test_trap_07_checks_of_dtype_and_device_are_no_part_of_the_graph() -> None:
    model = whole(training=False)
    assert any(op(n) in CHECKS for n in model.graph.nodes)
    program = normalize(capture(model))
    assert not any(op(n) in CHECKS for n in program.graph.nodes)
    gp.apply(model, "qv:lora")
    assert not any(op(n) in CHECKS for n in model.graph.nodes)
    gp.remove(model)
    assert any(op(n) in CHECKS for n in model.graph.nodes)


def test_trap_08_a_failing_capture_leaves_gradients_on() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return x if x.sum() > 0 else -x

    model = Fails().train()
    with pytest.raises(CaptureError):
        gp.sites(model, (X,))
    assert torch.is_grad_enabled()
    assert model.training
    assert torch.backends.mha.get_fastpath_enabled()


def test_trap_09_samples_have_no_dimension_of_one_and_none_alike() -> None:
    made = sample_inputs(ZOO["t5"]("eager"))
    assert all(size >= 2 for t in made.values() for size in t.shape)
    assert len({made["input_ids"].shape[0], *made["input_ids"].shape[1:], made["decoder_input_ids"].shape[1]}) == 3


def test_trap_09_a_batch_of_one_from_the_user_gives_the_same_sites() -> None:
    model = build("llama")
    single = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert [(s.role, s.weight) for s in gp.sites(model, single)] == [(s.role, s.weight) for s in gp.sites(model)]
    gp.apply(model, "qv:lora", inputs=single)
    assert outputs(model, call("llama", model))[0].shape[:2] == (2, 7)


def test_trap_10_a_transposed_weight_between_views() -> None:
    model = build("gpt2")
    gp.apply(model, "up+down:lora(r=2)")
    mlp = model.transformer.h[0].mlp
    assert [tuple(f.weight.shape) for f in mlp.c_fc.adapters.default.up.factors] == [(256, 2), (2, 64)]
    assert [tuple(f.weight.shape) for f in mlp.c_proj.adapters.default.down.factors] == [(64, 2), (2, 256)]
    x = torch.randn(3, 5, 64)
    with gp.disabled(model):
        base = mlp.c_fc(x)
    randomize(model)
    B, A = mlp.c_fc.adapters.default.up.factors
    assert torch.allclose(mlp.c_fc(x) - base, x @ A.weight.T @ B.weight.T, atol=1e-5)  # float32, another order


def test_trap_11_roles_of_one_weight_differ_in_shape() -> None:
    model = gp.apply(build("phi3"), "qv:lora(r=2)")
    home = model.model.layers[0].self_attn.qkv_proj.adapters.default
    assert home.q.factors[1].weight.shape == (64, 2)
    assert home.v.factors[1].weight.shape == (32, 2)


def test_trap_12_one_weight_with_several_calls_has_one_adapter() -> None:
    model = gp.apply(build("albert"), "qv:lora", expect=2)
    assert len(adapters(model)) == 4


def test_trap_12_an_adapted_head_is_an_adapted_embedding() -> None:
    """One weight, so one adapter, which acts in both places and is folded once."""
    model = build("gpt2")
    ids, x = torch.arange(6).view(1, 6), torch.randn(1, 6, 64)
    base = model.transformer.wte.weight.detach().clone()
    gp.apply(model, "head:lora", expect=1)
    assert len(adapters(model)) == 2
    randomize(model)
    B, A = model.transformer.wte.adapters.default.embed.factors
    update = base + B.weight @ A.weight
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.allclose(model.transformer.wte(ids), update[:6], atol=1e-5)  # float32, another order, as below
    assert torch.allclose(model.lm_head(x), x @ update.T, atol=1e-4)
    gp.merge(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.allclose(model.lm_head.weight, update, atol=1e-5)


class Tied(nn.Module):
    """A head that is its embedding, which the state dict holds under both names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(16, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embedding(ids))))


@pytest.mark.parametrize("strict", [True, False])
def test_trap_13_tied_weights_have_one_name_in_either_export(strict: bool) -> None:
    ids = torch.randint(0, 16, (2, 5))
    model = as_module(torch.export.export(Tied().eval(), (ids,), strict=strict))
    names = [s.weight for s in gp.sites(model)]
    assert len(names) == 2
    assert set(names) <= set(model.state_dict())
    assert "body.weight" in names
    gp.apply(model, "path(*):lora")
    randomize(model)
    with gp.disabled(model):
        base = run(model, ids)
    assert delta(run(model, ids), base) > 1e-4
    gp.remove(model)
    assert same(run(model, ids), base)


def test_trap_15_checkpointing_still_recomputes() -> None:
    model = build("llama").train()
    gp.apply(model, "qv:lora")
    randomize(model)
    passes: list[int] = []
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda *_: passes.append(1))
    example = call("llama", model)[1]
    model(**example).logits.sum().backward()
    assert len(passes) == 1
    model.activation_checkpointing_enable()
    passes.clear()
    model(**example).logits.sum().backward()
    assert len(passes) == 2


def test_trap_16_every_insertion_comes_after_what_it_reads() -> None:
    model = gp.apply(whole(nn.Sequential(Block(), Block())), "linear:lora")
    gp.apply(model, "qv:rlora", name="second")
    gp.activate(model, ("default", "second"))
    model.graph.lint()
    seen: set[fx.Node] = set()
    for node in model.graph.nodes:
        assert set(node.all_input_nodes) <= seen
        seen.add(node)


@torch.library.custom_op("graphpeft_tests::opaque_linear", mutates_args=())
def opaque_linear(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


@opaque_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.plain = nn.Parameter(torch.randn(16, 16)), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(opaque_linear(x, self.kernel))


def test_trap_18_a_weight_inside_a_custom_operator_is_not_taken_for_a_projection() -> None:
    model = Opaque()
    assert [s.weight for s in gp.sites(model, (X,))] == ["plain.weight"]
    with pytest.raises(MatchError, match=r"path\(kernel\):lora.*plain\.weight"):
        gp.apply(model, "path(kernel):lora", inputs=(X,))


class Untraceable(nn.Linear):
    """Its code branches on a shape, so that torch.fx cannot trace it: the weight itself is adapted instead."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[0] > 1 else super().forward(x[:1])


def test_trap_18_code_that_cannot_be_traced_takes_the_weight_form() -> None:
    model = nn.Sequential(Untraceable(16, 16), nn.Linear(16, 16))
    base = run(model)
    assert [s.form for s in gp.sites(model, (X,))] == ["weight", "branch"]
    gp.apply(model, "path(*):lora", inputs=(X,))
    assert same(run(model), base)
    randomize(model)
    adapted = run(model)
    assert delta(run(model, X[:1]), [adapted[0][:1]]) < 1e-6  # float32, another batch size
    dense = model[0].adapters.default
    update = next(iter(dense.values())).delta()
    with gp.disabled(model):
        first = F.linear(X, model[0].weight + update, model[0].bias)
    gp.merge(model)
    assert delta([model[0](X)], [first]) < 1e-5  # float32
    assert delta(run(model), adapted) < 1e-5
    gp.remove(model)
    assert same(run(model), base)


def test_trap_19_what_a_trainer_reads_is_still_there() -> None:
    model = build("llama")
    signature, config = inspect.signature(model.forward), model.config
    gp.apply(model, "qv:lora")
    assert inspect.signature(model.forward) == signature
    assert model.config is config
    ids = call("llama", model)[1]["input_ids"]
    assert model.train()(input_ids=ids, labels=ids).loss.requires_grad
    assert all(m.training for m in model.modules())
    assert not any(m.training for m in model.eval().modules())


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gpt_neox", "falcon", "falcon_new"])
def test_trap_20_fused_rows_are_found_without_any_values(name: str) -> None:
    """Rotary tables and causal masks are buffers that no state dict holds, and have no values on the meta device."""
    with torch.device("meta"):
        model = ZOO[name]("eager").eval()
    found = [(s.role, s.weight, s.rows) for s in gp.sites(model)]
    assert sorted(found, key=str) == sorted(expected(name), key=str)
