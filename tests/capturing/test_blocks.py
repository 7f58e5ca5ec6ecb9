"""Captures that leave equal blocks out give the graph of the full capture, and any doubt leads to the full capture."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from checks import EAGER_ONLY, Snapshot, inputs, randomize, sampled
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import graphpeft as gp
from graphpeft.capturing.blocks import Folding, kinds
from graphpeft.capturing.kinds import Used, module_diff, trap_ints
from graphpeft.capturing.normalize import normalize
from graphpeft.errors import CaptureError
from graphpeft.ir.program import Program
from graphpeft.match.find import find

capturing = importlib.import_module("graphpeft.capturing.capture")
X = torch.randn(2, 7, 8)


def text(program: Program) -> list[Any]:
    """All that a graph says but the names of its nodes: operators, operands, shapes, modules, lines of code."""
    graph = normalize(program).graph
    calls = {n: i for i, n in enumerate(n for n in graph.nodes if n.op != "placeholder")}

    def told(value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value.shape, value.dtype, value.stride() if isinstance(value, Tensor) else repr(value)
        constant = program.constants.get(value)
        if constant is not None and value not in program.weights and value.name.startswith("c_"):
            return constant.shape, str(constant)
        return calls.get(value, value.name)

    def leaf(value: Any) -> Any:
        return told(value) if isinstance(value, (fx.Node, Tensor)) else repr(value)

    def lines(node: fx.Node) -> Any:
        return [line for line in (node.meta.get("stack_trace") or "").splitlines() if "File" in line][-2:]

    return [
        (
            n.op,
            # Writes count for `functional` only where something else reads the tensor, which the marks of a block do.
            str(n.target).replace("_.", "."),
            [leaf(v) for v in pytree.tree_leaves((n.args, n.kwargs))],
            [leaf(v) for v in pytree.tree_leaves(n.meta.get("val"))],
            list(n.meta.get("nn_module_stack", {}).values()),
            lines(n),
        )
        for n in calls
    ]


def captured(model: nn.Module, given: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the blocks that were left out; the graph, and the sites in it, are those of the full capture."""
    left_out: list[str] = []

    def unfold(model: nn.Module, exported: Any) -> Any:
        nodes = [n for n in exported.graph.nodes if n.target is torch.ops.graphpeft.block.default]
        paths = [n.args[3] for n in nodes if not n.args[1]]
        result = unfold_(model, exported)
        left_out.extend(paths)
        return result

    unfold_ = importlib.import_module("graphpeft.capturing.expand_blocks").expand_blocks
    monkeypatch.setattr(capturing, "expand_blocks", unfold)
    shapes_only = any(p.is_meta for p in model.parameters())
    before = None if shapes_only else Snapshot.of(model)
    folded, full = gp.capture(model, given), gp.capture(model, given, blocks=False)
    if before is not None:
        before.check(model)
    folded.graph.lint()
    assert text(folded) == text(full)
    one, other = find(folded).sites, find(full).sites
    assert one == other
    # A line of code, where there is one; a node's number is not kept.
    assert [s.source for s in one if ":" in s.source] == [s.source for s in other if ":" in s.source]
    return left_out


DEEP: dict[str, Callable[[str], nn.Module]] = {
    "llama": lambda a: zoo.llama(a, layers=4),
    "gpt2": lambda a: zoo.gpt2(a, n_layer=4),
    "t5": lambda a: zoo.t5(a, num_layers=5),
    "t5_gated": lambda a: zoo.t5(a, num_layers=5, feed_forward_proj="gated-gelu"),
    "falcon": lambda a: zoo.falcon(a, num_hidden_layers=4, multi_query=True),
    "falcon_new": lambda a: zoo.falcon(a, num_hidden_layers=4, new_decoder_architecture=True, num_kv_heads=2),
    "torch_encoder": lambda a: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 4),
}
LEFT_OUT = {"t5": 4, "t5_gated": 4, "clip": 4} | dict.fromkeys(
    ["gemma2", "albert", "bloom", "distilbert", "whisper", "hand_written"], 0
)
"""Blocks left out of four, where not two: T5 has five and two stacks of them, the first of which is another kind."""


@pytest.mark.parametrize(
    "name",
    sampled(
        zoo.ZOO,
        "t5",
        "falcon",
        "bert",
        "qwen3",
        "phi3",
        "deberta_v2",
        "roberta",
        "falcon_new",
        "bloom",
        "distilbert",
        "t5_gated",
        "clip",
        "gpt_neox",
    ),
)
def test_the_graph_is_that_of_the_full_capture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(zoo.SMALL, "num_hidden_layers", 4)
    model = DEEP.get(name, zoo.ZOO[name])("eager" if name in EAGER_ONLY else "sdpa").eval()
    assert len(captured(model, inputs(name, model), monkeypatch)) == LEFT_OUT.get(name, 2)


def test_a_model_on_the_meta_device_has_the_same_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = zoo.llama(layers=4).eval()
    assert captured(model, None, monkeypatch) == ["model.layers.1", "model.layers.2"]


SMALL = dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
HYBRIDS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", dict(num_hidden_layers=12, head_dim=8), 8),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", dict(num_hidden_layers=6, head_dim=8, num_local_experts=4), 2),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", dict(num_hidden_layers=4, num_local_experts=4), 2),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        dict(num_hidden_layers=8, intermediate_size_mlp=48, head_dim=8, num_local_experts=2, interleave_moe_layer_step=2),
        2,
    ),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        "FalconH1Config",
        dict(num_hidden_layers=4, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, head_dim=8),
        2,
    ),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        dict(num_hidden_layers=8, num_experts=2, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False),
        3,
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        dict(
            num_hidden_layers=4, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
            shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=2,
            linear_key_head_dim=8, linear_value_head_dim=8,
        ),
        1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sampled(HYBRIDS, "jamba", "qwen3_next", "llama4", "gpt_oss", "mixtral", "falcon_h1"))
def test_each_kind_of_a_hybrid_has_its_own_representative(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls, config, sizes, left_out = HYBRIDS[name]
    torch.manual_seed(0)
    model = getattr(tf, cls)(getattr(tf, config)(**(SMALL | sizes))).eval()
    assert len(captured(model, None, monkeypatch)) == left_out


class Block(nn.Module):
    """A residual block whose work between two projections is given by `act`, which may look at anything."""

    def __init__(self, index: int, act: Callable[[Block, Tensor], Tensor] = lambda block, x: x.relu()) -> None:
        super().__init__()
        self.layer_idx, self.act = index, act
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return x + self.down(self.act(self, self.up(x)))


class Stack(nn.Module):
    """Five blocks in a row."""

    def __init__(self, act: Callable[[Block, Tensor], Tensor] = lambda block, x: x.relu()) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(i, act) for i in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


MIDDLE = ["layers.1", "layers.2", "layers.3"]


def test_equal_blocks_between_the_first_and_the_last_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert captured(Stack(), (X,), monkeypatch) == MIDDLE
    assert captured(nn.Sequential(*(Block(i) for i in range(5))), (X,), monkeypatch) == ["1", "2", "3"]


SCALES = [1.0, 2.0, 1.0, 2.0, 1.0]
LOOKS: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "parity": lambda b, x: x.relu() if b.layer_idx % 2 else x.tanh(),
    "factor": lambda b, x: x.relu() * b.layer_idx,
    "divisor": lambda b, x: x.relu() / (b.layer_idx + 1),
    "float over it": lambda b, x: x.relu() * (1.0 / (1 + b.layer_idx)),
    "index into a list": lambda b, x: x.relu() * SCALES[b.layer_idx],
    "index into a tensor": lambda b, x: x.relu() + x[..., b.layer_idx, None],
    "key": lambda b, x: x.relu() if b.layer_idx in {0, 2, 4} else x.tanh(),
    "member": lambda b, x: x.relu() if b.layer_idx in (0, 2, 4) else x.tanh(),
    "truth": lambda b, x: x.relu() if b.layer_idx else x.tanh(),
    "type": lambda b, x: x.relu() if isinstance(b.layer_idx, str) or b.layer_idx == 2 else x.tanh(),
    "text": lambda b, x: x.relu() if f"{b.layer_idx}" in "024" else x.tanh(),
    "range": lambda b, x: sum((x.relu() for _ in range(b.layer_idx)), x),
    "math": lambda b, x: x.relu() * math.sqrt(b.layer_idx),
    "new tensor": lambda b, x: x.relu() + torch.full((16,), b.layer_idx),
    "attribute": lambda b, x: x.relu() * b.layer_idx.bit_length(),
    "caught": lambda b, x: caught(b, x),
}
"""Ways in which code may depend on the index of its block."""


def caught(block: Block, x: Tensor) -> Tensor:
    try:
        return x.relu() if block.layer_idx % 2 else x.tanh()
    except Exception:
        return x


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())
def test_blocks_that_look_at_their_index_are_all_traced(
    look: Callable[[Block, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Stack(look)
    assert captured(model, (X,), monkeypatch) == []
    assert [layer.layer_idx for layer in model.layers] == [0, 1, 2, 3, 4]


def test_an_integer_that_counts_separates_blocks_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stack(lambda b, x: x.relu() * b.period)
    for layer in model.layers:
        layer.period = 1 if layer.layer_idx < 4 else 2
    assert captured(model, (X,), monkeypatch) == ["layers.1", "layers.2"]


def test_a_watch_notes_every_use_and_goes() -> None:
    block = Block(3)
    with trap_ints(block, {("", "layer_idx")}) as used:
        for use in (int, float, hash, repr, bool, len, iter, lambda v: v + 1, lambda v: 1.0 - v, lambda v: v == v):
            used.clear()
            with pytest.raises(Used):
                use(block.layer_idx)
            assert used == {"layer_idx"}
    assert block.layer_idx == 3


def other_forward(model: Stack) -> None:
    model.layers[2].forward = lambda x: x


def hook(model: Stack) -> None:
    model.layers[2].down.register_forward_hook(lambda m, a, out: out * 2)


def attribute(model: Stack) -> None:
    model.layers[2].eps = 1e-5
    for i in (0, 1, 3, 4):
        model.layers[i].eps = 1e-6


def function(model: Stack) -> None:
    model.layers[2].act = lambda block, x: x.tanh()


def shape(model: Stack) -> None:
    model.layers[2].up, model.layers[2].down = nn.Linear(8, 24), nn.Linear(24, 8)


def bias(model: Stack) -> None:
    model.layers[2].up = nn.Linear(8, 16, bias=False)


def kind(model: Stack) -> None:
    model.layers[2].down = nn.Sequential(model.layers[2].down)


def frozen(model: Stack) -> None:
    model.layers[2].requires_grad_(False)


def buffer(model: Stack) -> None:
    for i, layer in enumerate(model.layers):
        layer.register_buffer("index", torch.tensor([i == 2]))


def parametrized(model: Stack) -> None:
    nn.utils.parametrizations.weight_norm(model.layers[2].up)


def slots(model: Stack) -> None:
    class Slotted(Block):
        __slots__ = ("hidden",)

    model.layers[2] = Slotted(2)


@pytest.mark.parametrize(
    "change", [other_forward, hook, attribute, function, shape, bias, kind, frozen, buffer, parametrized, slots]
)
def test_a_block_that_differs_is_traced(change: Callable[[Stack], None], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stack()
    change(model)
    assert module_diff(model.layers[0], model.layers[2], frozenset()) is None
    assert captured(model, (X,), monkeypatch) == ["layers.1", "layers.3"]


def test_a_forward_on_every_instance_keeps_blocks_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stack()

    def forward(x: Tensor) -> Tensor:
        return x.relu()

    for layer in model.layers:
        layer.forward = forward
    assert captured(model, (X,), monkeypatch) == []
    assert all(layer.forward is forward for layer in model.layers)


def test_a_hook_on_every_block_and_a_global_hook_keep_blocks_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = Stack(), []
    for layer in model.layers:
        layer.register_forward_hook(lambda m, a, out: seen.append(m))
    assert captured(model, (X,), monkeypatch) == []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, out: None)
    try:
        assert captured(Stack(), (X,), monkeypatch) == []
    finally:
        handle.remove()


def counting() -> Callable[[Block, Tensor], Tensor]:
    """What a block does depends on how often any was called."""
    count = itertools.count()
    return lambda block, x: x.relu() if next(count) % 2 else x.tanh()


def remembering() -> Callable[[Block, Tensor], Tensor]:
    """A block changes when it is called."""

    def act(block: Block, x: Tensor) -> Tensor:
        block.calls = getattr(block, "calls", 0) + 1
        return x.relu()

    return act


class Calls(Stack):
    """Five blocks called in a way of its own, by a function of (layers, x)."""

    def __init__(self, call: Callable[[nn.ModuleList, Tensor], Any], block: type[Block] = Block) -> None:
        super().__init__()
        self.call = call
        self.layers = nn.ModuleList(block(i) for i in range(5))

    def forward(self, x: Tensor) -> Any:
        return self.call(self.layers, x)


HELD: list[Tensor] = []


class Leaks(Block):
    """Reads what the first block made, by a way that no argument shows."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        HELD.append(self.up(x))
        return x + self.down(HELD[-1].relu() + HELD[0])


class Shows(Block):
    """Hands a tensor to its caller, by a way that no output shows."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        HELD.append(self.up(x))
        return x + self.down(HELD[-1].relu())


def leaking(layers: nn.ModuleList, x: Tensor) -> Tensor:
    HELD.clear()
    for layer in layers:
        x = layer(x)
    return x + sum(HELD).mean()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Stack(counting()),
        lambda: Stack(remembering()),
        lambda: Calls(leaking, Leaks),
        lambda: Calls(leaking, Shows),
    ],
    ids=["counts", "remembers", "leaks", "shows"],
)
def test_blocks_tied_by_hidden_state_are_traced(make: Callable[[], Stack], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="graphpeft"):
        program = gp.capture(make(), (X,))
    assert "FoldingError" in caplog.text
    assert not [n for n in program.graph.nodes if "graphpeft" in str(n.target)]
    assert len(find(program).sites) == 10


class Returns(Block):
    """Returns its inputs, a value and nothing beside the result."""

    def forward(self, x: Tensor, mask: Tensor | None = None, seen: list[Tensor] | None = None) -> Any:
        y = super().forward(x if mask is None else x * mask.to(x.dtype))
        if seen is not None:
            seen.append(y)
        return y, mask, None, {"eps": 1e-5}


class InPlace(Block):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        x.mul_(2)
        return x + self.down(self.up(x).relu_())


class View(Block):
    """Returns a view of its input."""

    def forward(self, x: Tensor, **_: Any) -> Any:
        return x + self.down(self.up(x)), x[0]


def twice(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in (*layers, *layers):
        x = layer(x)
    return x


def with_mask(layers: nn.ModuleList, x: Tensor) -> Tensor:
    mask = torch.ones(7, 1)
    for layer in layers:
        x, mask, _, _ = layer(x, mask=mask)
    return x * mask + x


def masked_at_first(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for i, layer in enumerate(layers):
        x = layer(x, mask=torch.ones(7, 1) if i == 0 else None)[0]
    return x


def collecting(layers: nn.ModuleList, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    for layer in layers:
        x = layer(x, seen=seen)[0]
    return x + sum(seen)


def filling(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in layers:
        seen: list[Tensor] = []
        x = layer(x, seen=seen)[0] + seen[0]
    return x


def with_view(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in layers:
        x, view = layer(x)
        view.add_(1)
    return x


def in_place(layers: nn.ModuleList, x: Tensor) -> Tensor:
    x = x + 1
    for layer in layers:
        y = layer(x)
        x = x + y
    return x


def residual(layers: nn.ModuleList, x: Tensor) -> Tensor:
    return x + sum(layer(x) for layer in layers)


CALLS: dict[str, tuple[Calls, list[str]]] = {
    "twice": (Calls(twice), MIDDLE * 2),
    "inputs returned": (Calls(with_mask, Returns), MIDDLE),
    "another first call": (Calls(masked_at_first, Returns), ["layers.2", "layers.3"]),
    "a list that grows": (Calls(collecting, Returns), []),
    "a list that is filled": (Calls(filling, Returns), []),
    "views of inputs": (Calls(with_view, View), []),
    "inputs changed in place": (Calls(in_place, InPlace), MIDDLE),
    "one input for all": (Calls(residual), MIDDLE),
}


@pytest.mark.parametrize(("model", "left_out"), CALLS.values(), ids=CALLS.keys())
def test_calls_of_many_forms(model: Calls, left_out: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert captured(model, (X,), monkeypatch) == left_out


def test_tied_weights_count_each_of_their_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stack()
    for layer in model.layers:
        layer.up.weight = model.layers[0].up.weight
    assert captured(model, (X,), monkeypatch) == MIDDLE
    up = next(s for s in gp.sites(model, (X,)) if s.role == "up")
    assert up.calls == 5


def test_one_module_called_many_times_is_no_row_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, block = Stack(), Block(0)
    model.layers = nn.ModuleList([block] * 5)
    assert captured(model, (X,), monkeypatch) == []
    assert {s.calls for s in gp.sites(model, (X,))} == {5}


def test_the_outermost_container_counts() -> None:
    inner = [nn.Sequential(*(Block(i) for i in range(4))) for _ in range(3)]
    assert [k.paths for k in kinds(nn.Sequential(*inner))] == [["0", "1", "2"]]
    assert [k.paths[0] for k in kinds(nn.Sequential(*inner[:2]))] == ["0.0", "1.0"]


def test_adapters_on_some_blocks_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gp.apply(zoo.llama(layers=5).eval(), "qv[layers=0]:lora; up[layers=2-3]:lora", verify="off")
    randomize(model)
    sites = list(gp.sites(model))
    with gp.disabled(model):
        assert len(captured(model, None, monkeypatch)) == 3
    assert sites == list(gp.sites(zoo.llama(layers=5)))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_blocks_are_restored_when_the_capture_ends_early(error: type[BaseException]) -> None:
    def act(block: Block, x: Tensor) -> Tensor:
        raise error

    model = Stack(act)
    before = Snapshot.of(model)
    folding = Folding(model, kinds(model))
    with folding.folded():
        assert "forward" in model.layers[1].__dict__
        with pytest.raises(error):
            model(X)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else CaptureError):
        gp.capture(model, (X,))
    assert [layer.layer_idx for layer in model.layers] == [0, 1, 2, 3, 4]
    assert not any("forward" in m.__dict__ for m in model.modules())
    before.check(model)
