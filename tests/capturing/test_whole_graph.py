"""An exported program as the model itself: adapted, trained, switched between modes, copied, folded, restored."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from checks import Snapshot, adapters, build, call, delta, outputs, randomize, same
from expected_roles import expected
from torch import fx, nn
from torch.export import Dim, ExportedProgram

import graphpeft as gp
from graphpeft.errors import CaptureError
from graphpeft.match.products import op

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


def sample(batch: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def export(name: str, training: bool = True) -> ExportedProgram:
    """Exported as for training: with dropout, gradients, and a dynamic batch and length."""
    model = build(name).train(training)
    kwargs: dict[str, Any] = sample(2, 7)
    shape = {0: Dim("batch", min=2, max=64), 1: Dim("length", min=2, max=60)}
    shapes: dict[str, Any] = dict.fromkeys(kwargs, shape)
    if name != "bert":
        kwargs["use_cache"], shapes["use_cache"] = False, None
    return torch.export.export(model, (), kwargs, dynamic_shapes=shapes, strict=False)


def example(name: str, batch: int = 3, length: int = 5, seed: int = 0) -> tuple[tuple[()], dict[str, Any]]:
    return (), sample(batch, length, seed) | ({"use_cache": False} if name == "gpt2" else {})


@pytest.fixture(scope="module")
def programs() -> dict[str, ExportedProgram]:
    return {name: export(name) for name in ("gpt2", "bert")}


@pytest.fixture(params=["gpt2", "bert"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def module(name: str, programs: dict[str, ExportedProgram]) -> fx.GraphModule:
    """A graph module of its own for every test, as users make one from a program."""
    return copy.deepcopy(programs[name]).module(check_guards=False)


def probabilities(module: nn.Module) -> list[tuple[Any, ...]]:
    """Every dropout flag and probability in the graph."""
    found = []
    for node in module.graph.nodes:
        if op(node) == "dropout":
            found.append(node.args[1:])
        elif op(node) == "scaled_dot_product_attention":
            found.append((node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p"),))
    return found


def test_it_trains_on_changing_shapes(name: str, programs: dict[str, ExportedProgram]) -> None:
    model = gp.apply(copy.deepcopy(programs[name]), "attn+up+down:lora(r=8)")
    assert isinstance(model, fx.GraphModule)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    start = {n: p.detach().clone() for n, p in adapters(model).items()}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(start)
    optimizer = torch.optim.AdamW(adapters(model).values(), lr=5e-3)
    model.train()
    losses = []
    for step in range(24):
        batch, length = 2 + step % 3, 4 + step % 5
        _, kwargs = example(name, batch, length, seed=step % 2)
        logits = model(**kwargs).logits
        labels = kwargs["input_ids"] if name == "gpt2" else torch.ones(batch, dtype=torch.long)
        loss = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-6:]) < sum(losses[:6]) - 0.3  # nats over six steps each, dropout's noise averaged
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in base.items())
    assert all(not torch.equal(p, start[n]) for n, p in adapters(model).items())


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_sizes_that_vary_hide_no_role(name: str, programs: dict[str, ExportedProgram]) -> None:
    found = gp.sites(programs[name] if name in programs else export(name))
    listed = [(s.role, s.weight, s.rows) for s in found]
    assert sorted(listed, key=str) == sorted(expected(name), key=str)


def test_train_and_eval_switch_every_dropout(name: str, module: fx.GraphModule) -> None:
    exported = probabilities(module)
    assert exported
    with pytest.raises(NotImplementedError):
        module.eval()  # torch's own limit, which an adapter lifts
    assert gp.apply(module, "qv:lora", inputs=example(name)[1]) is module
    randomize(module)
    call = example(name)
    module.train()
    assert probabilities(module) == exported
    assert not same(outputs(module, call), outputs(module, call))
    module.eval()
    rates = [p[-1] if len(p) == 1 else p for p in probabilities(module)]
    assert all(p == 0.0 if isinstance(p, float) else p[-1] is False for p in rates)
    assert same(outputs(module, call), outputs(module, call))
    module.train()
    assert probabilities(module) == exported
    assert {m.training for m in module.modules() if m is not module} <= {True}


def test_eval_mode_agrees_with_the_eager_model_adapted_alike(name: str, module: fx.GraphModule) -> None:
    eager = build(name)
    gp.apply(eager, "qv:lora; up:rlora")
    gp.apply(module, "qv:lora; up:rlora")
    randomize(eager)
    pairs = list(zip(adapters(eager).values(), adapters(module).values(), strict=True))  # both in graph order
    for mine, other in pairs:
        other.data.copy_(mine.data)
    module.eval()
    # float32 through two layers; the export decomposes nothing, but masks are made otherwise.
    assert delta(outputs(module, example(name))[:1], outputs(eager, example(name))[:1]) < 1e-5
    for model in (eager, module):
        model(**example(name)[1]).logits.pow(2).sum().backward()
    assert all((a.grad - b.grad).abs().max() < 1e-4 * a.grad.abs().max() for a, b in pairs)


def test_life_of_an_adapter(name: str, module: fx.GraphModule) -> None:
    before = Snapshot.of(module)
    gp.apply(module, "qv:lora(dropout=0.1); up:rlora", verify="full", inputs=example(name)[1])
    assert set(before.tensors) <= set(module.state_dict())
    randomize(module)
    module.eval()
    adapted = outputs(module, example(name))
    with gp.disabled(module):
        base = outputs(module, example(name))
    assert delta(adapted, base) > 1e-4
    assert gp.verify(module, example(name)[1]).ok

    gp.merge(module)
    assert list(module.state_dict()) == list(before.tensors)
    # float32: one rounding per weight, through two layers.
    assert delta(outputs(module, example(name)), adapted) < 1e-5
    gp.unmerge(module)
    assert same(outputs(module, example(name)), adapted)

    gp.remove(module)
    before.check(module)


def test_copies_are_independent(name: str, module: fx.GraphModule) -> None:
    gp.apply(module, "qv:lora")
    randomize(module)
    module.eval()
    before = outputs(module, example(name))
    clone = copy.deepcopy(module)
    assert same(outputs(clone, example(name)), before)
    randomize(clone, seed=1)
    clone.train()
    moved = outputs(clone.eval(), example(name))
    assert delta(moved, before) > 1e-4
    assert same(outputs(module, example(name)), before)
    code = clone.code
    gp.remove(module)
    assert clone.code == code
    assert same(outputs(clone, example(name)), moved)
    gp.remove(clone)
    assert clone.code == module.code
    assert list(clone.state_dict()) == list(module.state_dict())


def test_copy_of_a_merged_graph(name: str, module: fx.GraphModule) -> None:
    gp.apply(module, "qv:lora")
    randomize(module)
    module.eval()
    gp.merge(module)
    clone = copy.deepcopy(module)
    merged = outputs(module, example(name))
    gp.unmerge(module)
    randomize(module, seed=1)
    assert same(outputs(clone, example(name)), merged)


def test_several_adapters(name: str, module: fx.GraphModule) -> None:
    gp.apply(module, "q:lora", name="one")
    gp.apply(module, "v:lora", name="two")
    randomize(module, "one")
    randomize(module, "two")
    module.eval()
    found = []
    for chosen in ("one", "two", ("one", "two"), None):
        gp.activate(module, chosen)
        found.append(outputs(module, example(name)))
    assert all(delta(a, b) > 1e-5 for i, a in enumerate(found) for b in found[:i])


def test_inserted_nodes_tell_where_they_belong(module: fx.GraphModule) -> None:
    gp.apply(module, "q:lora")
    inserted = [n for n in module.graph.nodes if "graphpeft" in n.meta]
    assert inserted
    for node in inserted:
        path = list(node.meta["nn_module_stack"].values())[-1][0]
        assert path.startswith("adapters.default.")
        assert path.endswith("_q")


def test_exported_in_eval_mode() -> None:
    module = gp.apply(export("gpt2", training=False), "qv:lora(dropout=0.2)")
    randomize(module)
    module.eval()
    assert same(outputs(module, example("gpt2")), outputs(module, example("gpt2")))
    module.train()
    assert not same(outputs(module, example("gpt2")), outputs(module, example("gpt2")))


def test_a_graph_without_shapes_is_refused() -> None:
    made = torch.fx.experimental.proxy_tensor.make_fx(lambda x, w: torch.nn.functional.linear(x, w).relu())
    graph = made(torch.randn(2, 3), torch.randn(4, 3))
    for node in graph.graph.nodes:
        node.meta.pop("val", None)
    with pytest.raises(CaptureError, match=r"no shapes.*torch\.export\.export"):
        gp.sites(graph)


def test_a_traced_module_of_modules_is_adapted_at_its_modules() -> None:
    """A `GraphModule` from `symbolic_trace` calls modules: it is captured and rewritten as any module is."""
    traced = fx.symbolic_trace(build("hand_written"))
    x = torch.randn(2, 7, 32)
    before = Snapshot.of(traced)
    base = outputs(traced, ((x,), {}))
    gp.apply(traced, "qvo:lora", inputs=(x,))
    assert same(outputs(traced, ((x,), {})), base)
    randomize(traced)
    assert delta(outputs(traced, ((x,), {})), base) > 1e-4
    gp.remove(traced)
    before.check(traced)
    assert same(
        outputs(traced, call("hand_written", traced)), outputs(build("hand_written"), call("hand_written", traced))
    )
