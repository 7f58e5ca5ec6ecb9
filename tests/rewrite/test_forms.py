"""Weights that are no plain projection: embedding tables, convolutions, stacks of experts, tied weights."""

from __future__ import annotations

import copy
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from checks import Snapshot, adapters, delta, floats, outputs, randomize, same, sampled
from torch import nn
from zoo import VOCAB, gpt2, t5

import graphpeft as gp
from graphpeft.errors import AdapterError, ExportError, FileError, VerifyError
from graphpeft.ir.site import Rows, Site
from graphpeft.ir.weights import get_parameter
from graphpeft.match.owners import lookups, trace
from graphpeft.methods import LoRA, Method, RLoRA
from graphpeft.passes.initialize import initialize
from graphpeft.passes.insert import insert
from graphpeft.planning.plan import Entry
from graphpeft.rewrite.adapters import home, places
from graphpeft.rewrite.owner import Adapted
from graphpeft.rewrite.state import chains, find_state, get_state
from graphpeft.rewrite.sync import set_active
from graphpeft.rewrite.weight_form import _running

Call = tuple[tuple[Any, ...], dict[str, Any]]
LORA, RLORA = LoRA(r=3, alpha=6.0), RLoRA(r=12)
IDS = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))


def site(model: nn.Module, weight: str, role: str, form: str = "weight", **more: Any) -> Site:
    """The site of a weight whose own module is its owner."""
    shape = tuple(get_parameter(model, weight).shape)
    if more.get("stack"):
        shape = shape[1:]
    elif len(shape) > 2:
        shape = (shape[0], prod(shape[1:]))
    full, inputs = shape[::-1] if more.get("transposed") else shape
    rows: Rows | None = more.pop("rows", None)
    out = sum(b - a for a, b in rows) if rows else full
    owner = weight.rpartition(".")[0]
    return Site(role, weight, rows, False, None, (out, inputs), form, owner, full, **more)  # type: ignore[arg-type]


def adapt(
    model: nn.Module, sites: list[Site], method: Method = LORA, name: str = "default", seed: int = 0
) -> nn.Module:
    """What gp.apply does once it has a plan."""
    insert(model, name, f"linear:{method}", seed, tuple(Entry(s, method, f"{s.role}:{method}") for s in sites))
    initialize(model, name)
    set_active(model, (name,))
    return model


# -- the cases -----------------------------------------------------------------------------------------------------


class Words(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(20, 16, **options), nn.Linear(16, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.table(ids)))


def words(**options: Any) -> tuple[nn.Module, list[Site], Call]:
    model = Words(**options)
    form = "weight" if options.get("max_norm") else "branch"
    return model, [site(model, "table.weight", "embed", form)], ((IDS % 20,), {})


def gemma() -> tuple[nn.Module, list[Site], Call]:
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, head_dim=16)
    config = tf.Gemma3TextConfig(vocab_size=VOCAB, num_key_value_heads=2, tie_word_embeddings=False, **sizes)
    model = tf.Gemma3ForCausalLM(config)
    return model, [site(model, "model.embed_tokens.weight", "embed", "branch")], ((), {"input_ids": IDS})


def convolution(kind: type[nn.Module], **options: Any) -> tuple[nn.Module, list[Site], Call]:
    model = nn.Sequential(kind(8, 12, **options), nn.Tanh(), nn.Flatten(), nn.LazyLinear(5))
    x = torch.randn(2, 8, *([9] if kind is nn.Conv1d else [9, 7]), generator=torch.Generator().manual_seed(1))
    model(x)
    return model, [site(model, "0.weight", "conv")], ((x,), {})


def fused_convolution() -> tuple[nn.Module, list[Site], Call]:
    model, _, example = convolution(nn.Conv2d, kernel_size=3)
    return (
        model,
        [site(model, "0.weight", r, rows=rows) for r, rows in (("q", ((0, 4),)), ("v", ((6, 9), (10, 12))))],
        example,
    )


MOE = dict(hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def mixtral(implementation: str = "eager") -> tuple[nn.Module, list[Site], Call]:
    config = tf.MixtralConfig(vocab_size=VOCAB, num_local_experts=4, num_experts_per_tok=2, **MOE)
    model = tf.MixtralForCausalLM(config)
    model.set_experts_implementation(implementation)
    halves = {"experts.gate": ((0, 24),), "experts.up": ((24, 48),)}
    sites = [
        *(site(model, f"{p}.gate_up_proj", role, stack=4, rows=rows) for p in EXPERTS for role, rows in halves.items()),
        *(site(model, f"{p}.down_proj", "down", stack=4) for p in EXPERTS),
    ]
    return model, sites, ((), {"input_ids": IDS})


def gpt_oss(implementation: str = "eager") -> tuple[nn.Module, list[Site], Call]:
    config = tf.GptOssConfig(vocab_size=VOCAB, num_local_experts=4, num_experts_per_tok=2, head_dim=8, **MOE)
    model = tf.GptOssForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() < 3:
            nn.init.normal_(parameter, std=0.2)
    model.set_experts_implementation(implementation)
    even = tuple((i, i + 1) for i in range(0, 48, 2))
    stacked: dict[str, Any] = dict(stack=4, transposed=True)
    sites = [
        *(site(model, f"{p}.gate_up_proj", "gate", rows=even, **stacked) for p in EXPERTS),
        *(site(model, f"{p}.down_proj", "down", **stacked) for p in EXPERTS),
    ]
    return model, sites, ((), {"input_ids": IDS})


class Heads(nn.Module):
    """Projections whose outputs or inputs have two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.split, self.join = nn.Parameter(torch.randn(12, 2, 5) / 4), nn.Parameter(torch.randn(2, 5, 12) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bhd,hdo->bo", torch.tanh(torch.einsum("bi,ihd->bhd", x, self.split)), self.join)


def heads() -> tuple[nn.Module, list[Site], Call]:
    shared: dict[str, Any] = dict(rows=None, cross=False, layer=None, form="weight", transposed=True)
    sites = [
        Site(role="q", weight="split", shape=(10, 12), full=10, **shared),
        Site(role="o", weight="join", shape=(12, 10), full=12, **shared),
    ]
    return Heads(), sites, ((torch.randn(3, 12, generator=torch.Generator().manual_seed(1)),), {})


EXPERTS = [f"model.layers.{i}.mlp.experts" for i in range(2)]


def tie(model: nn.Module, first: Site, *others: Site) -> Site:
    assert all(get_parameter(model, s.weight) is get_parameter(model, first.weight) for s in others)
    return replace(first, tied=others)


def tied_gpt2() -> tuple[nn.Module, list[Site], Call]:
    model = gpt2()
    head = site(model, "lm_head.weight", "head", "branch")
    return model, [tie(model, site(model, "transformer.wte.weight", "embed", "branch"), head)], ((), {"input_ids": IDS})


def tied_t5() -> tuple[nn.Module, list[Site], Call]:
    """Encoder, decoder and head use one weight; `shared` holds it too and is never called."""
    model = t5()
    names = {"encoder.embed_tokens": "embed", "decoder.embed_tokens": "embed", "lm_head": "head"}
    one = tie(model, *(site(model, f"{n}.weight", role, "branch") for n, role in names.items()))
    return model, [one], ((), {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]})


CASES: dict[str, Callable[[], tuple[nn.Module, list[Site], Call]]] = {
    "embedding": words,
    "embedding padded": lambda: words(padding_idx=4),
    "embedding of bounded norm": lambda: words(max_norm=0.8),
    "embedding scaled": gemma,
    "conv1d grouped, kernel 1": lambda: convolution(nn.Conv1d, kernel_size=1, groups=4),
    "conv1d, kernel 3": lambda: convolution(nn.Conv1d, kernel_size=3, padding="same"),
    "conv2d, kernel 1": lambda: convolution(nn.Conv2d, kernel_size=1),
    "conv2d, stride 2": lambda: convolution(nn.Conv2d, kernel_size=3, stride=2, padding=1),
    "conv2d circular": lambda: convolution(nn.Conv2d, kernel_size=3, padding=1, padding_mode="circular"),
    "conv2d grouped": lambda: convolution(nn.Conv2d, kernel_size=3, groups=2),
    "conv2d, rows": fused_convolution,
    "several axes": heads,
    "mixtral eager": mixtral,
    "mixtral batched": lambda: mixtral("batched_mm"),
    "mixtral grouped": lambda: mixtral("grouped_mm"),
    "gpt-oss eager": gpt_oss,
    "gpt-oss batched": lambda: gpt_oss("batched_mm"),
    "gpt-oss grouped": lambda: gpt_oss("grouped_mm"),
    "tied gpt2": tied_gpt2,
    "tied t5": tied_t5,
}


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[Site], Call]:
    """A case in eval mode, the same weights every time."""
    torch.manual_seed(7)
    model, sites, (args, kwargs) = CASES[name]()
    cast = [a.to(dtype) if a.is_floating_point() else a for a in args]
    return model.to(dtype).eval(), sites, (tuple(cast), kwargs)


def precision(name: str) -> tuple[torch.dtype, float]:
    """float64 and its rounding, or float32 where the kernel has no other; of outputs of size about 1."""
    return (torch.float32, 1e-5) if "grouped" in name and "conv" not in name else (torch.float64, 1e-12)


case = pytest.mark.parametrize("name", CASES)
any_method = pytest.mark.parametrize("method", [LORA, RLORA], ids=["lora", "rlora"])


def by_hand(one: Site, method: Method, branch: nn.Module, seed: int = 0) -> torch.Tensor:
    """ΔW in the weight's own layout, from the raw tensors of the adapter and the formula of the method."""
    trained = [p.detach() for p in branch.parameters()]
    matrices = []
    for e in range(one.stack or 1):
        left, right = (t[e] if one.stack else t for t in trained)
        if isinstance(method, LoRA):
            found = 2.0 * left @ right  # α / r
        else:
            alone = method.chain(one).to(left.dtype)
            alone.reset(seed, f"{one.key}[{e}]" if one.stack else one.key)
            found = left[:, None] * (alone.factors[1].matrix() @ (right[:, None] * alone.factors[3].matrix()))
        whole = found.new_zeros(one.full, one.inputs)
        whole[[i for run in one.rows or ((0, one.full),) for i in range(*run)]] = found
        matrices.append(whole.T if one.transposed else whole)
    return torch.stack(matrices) if one.stack else matrices[0]


def with_dense_updates(name: str, adapted: nn.Module, method: Method, dtype: torch.dtype) -> nn.Module:
    """A plain model whose weights hold the updates."""
    model = made(name, dtype)[0]
    for path, parameter in model.named_parameters():
        parameter.data.copy_(get_parameter(adapted, path))  # a bounded norm is enforced in place, on the base
    for one, branch in chains(adapted, "default").items():
        weight = get_parameter(model, one.weight)
        weight.data += by_hand(one, method, branch).view_as(weight)
    return model


# -- what holds for all of them ------------------------------------------------------------------------------------


@case
@any_method
def test_a_fresh_adapter_changes_no_bit(name: str, method: Method) -> None:
    model, sites, example = made(name, precision(name)[0])
    before, base = outputs(model, example), Snapshot.of(model)
    adapt(model, sites, method)
    assert same(outputs(model, example), before)
    gp.remove(model)
    base.check(model)


@case
@any_method
def test_the_output_is_that_of_the_dense_update(name: str, method: Method) -> None:
    dtype, close = precision(name)
    model, sites, example = made(name, dtype)
    base = outputs(model, example)
    adapt(model, sites, method)
    randomize(model)
    expected = outputs(with_dense_updates(name, model, method, dtype), example)
    assert delta(expected, base) > 1e-2
    scale = max(float(t.abs().max()) for t in expected)
    assert delta(outputs(model, example), expected) < close * max(scale, 1)
    with gp.disabled(model):
        assert same(outputs(model, example), base)


@case
def test_gradients_are_those_of_the_dense_update_and_reach_the_adapter_alone(name: str) -> None:
    dtype, close = precision(name)
    model, sites, (args, kwargs) = made(name, dtype)
    adapt(model, sites)
    randomize(model)
    floats(model(*args, **kwargs))[0].pow(2).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(found) == set(adapters(model))

    plain = with_dense_updates(name, model, LORA, dtype)
    floats(plain(*args, **kwargs))[0].pow(2).sum().backward()
    for one, branch in chains(model, "default").items():
        wanted = list(branch.parameters())
        dense = by_hand_with_gradients(one, wanted)
        weight = get_parameter(plain, one.weight)
        expected = torch.autograd.grad(dense.view_as(weight), wanted, weight.grad)
        got = [p.grad for p in wanted]
        scale = max(float(t.abs().max()) for t in expected)
        assert scale > 1e-3
        if name == "embedding padded":  # the padding row is held back in B, whose row it is; A is common to all rows
            got, expected = got[:1], expected[:1]
        assert delta(got, expected) < close * 10 * max(scale, 1)


def by_hand_with_gradients(one: Site, trained: list[torch.Tensor]) -> torch.Tensor:
    b, a = trained
    update = 2.0 * b @ a
    rows = [i for run in one.rows or ((0, one.full),) for i in range(*run)]
    whole = update.new_zeros(*update.shape[:-2], one.full, one.inputs).index_add(-2, torch.tensor(rows), update)
    return whole.mT if one.transposed else whole


@case
@any_method
def test_merged_is_adapted_and_unmerging_is_exact(name: str, method: Method) -> None:
    dtype, close = precision(name)
    model, sites, example = made(name, dtype)
    before = Snapshot.of(model)
    adapt(model, sites, method)
    randomize(model)
    adapted = outputs(model, example)
    scale = max(float(t.abs().max()) for t in adapted)
    gp.merge(model)
    assert not any(isinstance(m, Adapted) for m in model.modules())
    assert delta(outputs(model, example), adapted) < close * max(scale, 1)
    gp.unmerge(model)
    assert same(outputs(model, example), adapted)
    gp.remove(model)
    before.check(model)


@case
@any_method
def test_a_saved_adapter_is_loaded(name: str, method: Method, tmp_path: Path) -> None:
    dtype = precision(name)[0]
    model, sites, example = made(name, dtype)
    adapt(model, sites, method, seed=3)
    randomize(model)
    adapted = outputs(model, example)
    gp.save(model, tmp_path)
    again = gp.load(made(name, dtype)[0], tmp_path)
    assert same(outputs(again, example), adapted)
    assert gp.trainable(again) == gp.trainable(model)
    assert get_state(again).adapters["default"].entries == get_state(model).adapters["default"].entries
    gp.merge(model)
    gp.save(model, tmp_path / "merged")
    assert (tmp_path / "merged" / "adapter.json").read_bytes() == (tmp_path / "adapter.json").read_bytes()


@case
def test_copies_and_pickles(name: str) -> None:
    dtype = precision(name)[0]
    model, sites, example = made(name, dtype)
    adapt(model, sites)
    randomize(model)
    before = outputs(model, example)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for clone in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert same(outputs(clone, example), before)
        assert len(adapters(clone)) == len(adapters(model))
        randomize(clone, seed=1)
        assert delta(outputs(clone, example), before) > 1e-4
        assert same(outputs(model, example), before)


@case
def test_casting(name: str) -> None:
    model, sites, example = made(name, torch.float32)
    adapt(model, sites)
    randomize(model, std=0.1)
    before = outputs(model, example)
    scale = max(float(t.abs().max()) for t in before)
    model.to(torch.bfloat16)
    args = tuple(a.bfloat16() if a.is_floating_point() else a for a in example[0])
    found = outputs(model, (args, example[1]))
    assert {t.dtype for t in found} == {torch.bfloat16}
    if "mixtral" not in name and "oss" not in name:  # a rounded router may choose another expert
        # bfloat16 keeps 8 bits: 0.4 % per operation, some ten of them on top of one another.
        assert delta(found, before) < 0.1 * scale


@case
def test_a_base_in_half_precision(name: str) -> None:
    """The adapter is float32 there, and the update is added in float32."""
    model, sites, (args, kwargs) = made(name, torch.bfloat16)
    base = outputs(model, (args, kwargs))
    adapt(model, sites)
    assert {p.dtype for p in adapters(model).values()} == {torch.float32}
    assert same(outputs(model, (args, kwargs)), base)
    randomize(model)
    found = floats(model(*args, **kwargs))
    assert {t.dtype for t in found} == {torch.bfloat16}
    assert delta(found, base) > 1e-2
    found[0].float().pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapters(model).values())


COMPILED = [name for name in CASES if "eager" not in name and name != "gpt-oss grouped"]


@pytest.mark.parametrize("name", sampled(COMPILED, "gpt-oss batched", "mixtral batched", "tied gpt2"))
def test_compile_without_graph_breaks(name: str) -> None:
    """Eager experts loop over what they find, and their base breaks the graph too."""
    model, sites, example = made(name, torch.float32)
    adapt(model, sites)
    randomize(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    # The same kernels in the same order, but for scalars that Dynamo computes ahead.
    assert delta(outputs(compiled, example), outputs(model, example)) < 1e-5


@pytest.mark.parametrize("name", ["mixtral eager", "tied gpt2"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(name: str, reentrant: bool) -> None:
    model, sites, (args, kwargs) = made(name)
    adapt(model, sites)
    randomize(model)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(*args, **kwargs).logits.pow(2).sum().backward()
        return [p.grad.clone() for p in adapters(model).values() if p.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    # The same sums in the same order.
    assert delta(gradients(), plain) < 1e-9 * max(float(g.abs().max()) for g in plain)
    assert len(plain) == len(adapters(model))


@case
def test_verification_passes(name: str) -> None:
    model, sites, (args, kwargs) = made(name, torch.float32)
    adapt(model, sites)
    given = args or kwargs
    assert gp.verify(model, given, identity=True).ok
    randomize(model, std=0.05)
    assert gp.verify(model, given).ok


@pytest.mark.parametrize(
    "name", sampled(CASES, "gpt-oss grouped", "gpt-oss batched", "mixtral eager", "mixtral batched")
)
def test_the_views_print(name: str) -> None:
    model, sites, (args, kwargs) = made(name)
    adapt(model, sites)
    count = gp.trainable(model)[0]
    assert f"{len(sites)} sites, {count:,} parameters" in str(gp.explain(model))
    assert sum(e.parameters() for e in get_state(model).adapters["default"].entries) == count
    diff = gp.diff(model, inputs=args or kwargs)
    assert diff.absent == ()
    assert sum(p.numbers for p in diff.parameters) == count
    assert ("added" in diff.operators) == any(site.form == "weight" for site in sites)
    assert ("add_rows" in diff.operators) == any(s.form == "branch" and s.role == "embed" for s in sites)
    shown = {hunk.path for hunk in diff.hunks}
    for site in (s for s in sites if s.form == "branch"):
        assert {re.sub(r"\.\d+(\.|$)", r".*\1", place.owner, count=1) for place in places(site)} & shown


# -- counts --------------------------------------------------------------------------------------------------------


def test_a_stack_counts_every_matrix() -> None:
    model, sites, _ = made("mixtral eager")
    adapt(model, sites)
    # Per expert r · (in + out): gate and up are 32 to 24, down 24 to 32.
    assert gp.trainable(model)[0] == 2 * 4 * 3 * (3 * (32 + 24))
    assert Entry(sites[0], LORA, "").parameters() == 4 * 3 * (32 + 24)
    assert "4 × 24 × 32" in str(gp.explain(model))


def test_a_tied_adapter_counts_once() -> None:
    model, sites, _ = made("tied t5")
    adapt(model, sites)
    assert gp.trainable(model)[0] == 3 * (VOCAB + 64)
    assert "encoder.embed_tokens.weight = decoder.embed_tokens.weight = lm_head.weight" in str(gp.explain(model))


# -- the weight form -----------------------------------------------------------------------------------------------


class Loop(nn.Module):
    """Reads its weight once for each matrix, as experts do, and may call itself or fail on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 4, 4))
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, depth: int = 0, fail: bool = False, frozen: bool = False) -> torch.Tensor:
        for e in range(3):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not (frozen and e == 0)):
                weight = self.stack
            self.seen.append(weight)
            x = x @ weight[e]
        if fail:
            raise ZeroDivisionError
        return self(x, depth - 1) if depth else x


def loop() -> Loop:
    model = Loop()
    adapt(model, [site(model, "stack", "other", stack=3)])
    randomize(model)
    return model


def test_an_adapted_weight_is_made_once_per_forward() -> None:
    model, x = loop(), torch.randn(2, 4)
    model(x, depth=2)
    assert len(model.seen) == 9
    assert len({id(t) for t in model.seen}) == 1
    first = model.seen[0]
    model(x)
    assert model.seen[-1] is not first


def test_an_adapted_weight_is_dropped_after_a_failure() -> None:
    model, x = loop(), torch.randn(2, 4)
    with pytest.raises(ZeroDivisionError):
        model(x, fail=True)
    assert not _running.sums
    before = model(x)
    randomize(model, seed=1)
    assert delta([model(x)], [before]) > 1e-3


def test_a_weight_read_without_gradients_is_not_trained_with() -> None:
    model, x = loop(), torch.randn(2, 4)
    model(x, frozen=True).sum().backward()
    for parameter in adapters(model).values():
        assert parameter.grad[1:].abs().sum() > 0
        assert not parameter.grad[0].any()


def test_a_weight_read_from_outside_is_the_bases() -> None:
    model = loop()
    assert model.stack is model._parameters["stack"]


def test_the_signature_is_the_modules_own() -> None:
    import inspect

    model = loop()
    assert inspect.signature(model.forward) == inspect.signature(Loop().forward)
    program = torch.export.export(model, (torch.randn(2, 4),)).module()
    x = torch.randn(2, 4)
    # The same kernels.
    assert delta([program(x)], [model(x)]) < 1e-6


class Both(nn.Module):
    """Owns a projection, below it, and a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.stack = nn.Linear(4, 3, bias=False), nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.nn.functional.linear(x, self.router.weight)
        return torch.einsum("be,eoi,bi->bo", scores, self.stack, x)


def test_one_owner_with_both_forms() -> None:
    model, x = Both().double(), torch.randn(2, 4, dtype=torch.float64)
    base = model(x)
    router = replace(site(model, "router.weight", "router", "branch"), owner="")
    adapt(model, [router, site(model, "stack", "other", stack=3)])
    assert torch.equal(model(x), base)
    randomize(model)
    adapted = model(x)
    plain = Both().double()
    for one, branch in chains(model, "default").items():
        get_parameter(plain, one.weight).data.copy_(get_parameter(model, one.weight) + by_hand(one, LORA, branch))
    # float64
    assert delta([adapted], [plain(x)]) < 1e-12
    assert gp.verify(model, (x,)).ok
    gp.merge(model)
    assert delta([model(x)], [adapted]) < 1e-12


# -- whole graphs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["embedding padded", "conv2d, stride 2", "conv1d grouped, kernel 1", "tied"])
@any_method
def test_in_an_exported_graph(name: str, method: Method) -> None:
    if name == "tied":
        torch.manual_seed(7)
        module, example = Tied().double(), ((IDS,), {})
    else:
        module, sites, example = made(name)
    model = torch.export.export(module, *example).module()
    names = [n for n, p in model.named_parameters() if p.dim() > 1]
    base = outputs(model, example)
    if name == "tied":
        head = site(model, names[0], "head", "branch")
        whole = [replace(head, role="embed", tied=(head,))]
    else:
        whole = sites
    adapt(model, [replace(s, owner="", tied=tuple(replace(t, owner="") for t in s.tied)) for s in whole], method)
    assert same(outputs(model, example), base)
    randomize(model)
    adapted = outputs(model, example)
    assert delta(adapted, base) > 1e-2
    assert gp.verify(model, example[0]).ok
    clone = copy.deepcopy(model)
    gp.merge(model)
    # float64
    assert delta(outputs(model, example), adapted) < 1e-12
    gp.unmerge(model)
    gp.remove(model)
    assert same(outputs(model, example), base)
    assert same(outputs(clone, example), adapted)
    again = torch.export.export(clone, *example).module()
    assert delta(outputs(again, example), adapted) < 1e-12


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCAB, 16), nn.Linear(16, VOCAB, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.table(ids)))


# -- tied weights --------------------------------------------------------------------------------------------------


def test_one_chain_serves_every_place() -> None:
    model, sites, _ = made("tied t5")
    adapt(model, sites)
    for clone in (model, copy.deepcopy(model).to(torch.bfloat16)):
        held = [clone.encoder.embed_tokens, clone.decoder.embed_tokens, clone.lm_head]
        branches = [next(home(m).branches("default"))[1] for m in held]
        assert len({id(b) for b in branches}) == 1
        assert len({id(p) for b in branches for p in b.parameters()}) == 2
    assert not isinstance(model.shared, Adapted)
    gp.activate(model, None)
    assert not any(isinstance(m, Adapted) for m in model.modules())


def test_a_place_that_ignores_a_tied_adapter_is_noticed() -> None:
    """As a fused loss that multiplies by `lm_head.weight` itself and never calls the head."""
    model, sites, (_, kwargs) = made("tied gpt2", torch.float32)
    model.lm_head = Bypassed(model.lm_head)
    moved = replace(sites[0].tied[0], weight="lm_head.inner.weight", owner="lm_head.inner")
    adapt(model, [replace(sites[0], tied=(moved,))])
    randomize(model, std=0.05)
    with pytest.raises(VerifyError, match=r"FAIL tied weights: ignored at lm_head\.inner\.weight"):
        gp.verify(model, kwargs)
    assert all(home(m).active == ("default",) for m in (model.transformer.wte, model.lm_head.inner))


def test_a_replaced_forward_is_refused_also_after_an_equal_layer_was_adapted() -> None:
    """Equal layers share one generated class, which a `forward` on the instance would hide."""
    first, second = nn.Sequential(nn.Linear(8, 4)), nn.Sequential(nn.Linear(8, 4))
    place = site(first, "0.weight", "q", "branch")
    adapt(first, [place])
    second[0].forward = lambda x: x[..., :4]
    with pytest.raises(AdapterError, match=r"no use of 0\.weight.*`forward` was replaced on the instance"):
        adapt(second, [place])


class Bypassed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.inner._parameters["weight"])


def test_two_adapters_of_one_tied_weight_from_either_end() -> None:
    model, sites, example = made("tied gpt2")
    head = replace(sites[0].tied[0], tied=(replace(sites[0], tied=()),))
    adapt(model, sites, name="one")
    adapt(model, [head], name="two")
    randomize(model, "one")
    randomize(model, "two", seed=1)
    gp.activate(model, ("one", "two"))
    adapted = outputs(model, example)
    gp.merge(model)
    # float64
    assert delta(outputs(model, example), adapted) < 1e-10
    gp.unmerge(model)
    assert same(outputs(model, example), adapted)


def test_an_adapter_of_the_head_alone_is_not_merged() -> None:
    model, sites, _ = made("tied gpt2")
    adapt(model, list(sites[0].tied))
    with pytest.raises(AdapterError, match=r"lm_head\.weight is tied: .*Untie it"):
        gp.merge(model)


def test_a_model_untied_after_planning_is_refused() -> None:
    model, sites, _ = made("tied gpt2")
    adapt(model, sites)
    model.lm_head._parameters["weight"] = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(AdapterError, match=r"lm_head\.weight was tied to transformer\.wte\.weight .*Tie them again"):
        gp.merge(model)
    gp.remove(model)
    with pytest.raises(AdapterError, match=r"planned as one tied weight, and are two tensors now.*Plan again"):
        adapt(model, sites)
    assert find_state(model) is None
    assert home(model.transformer.wte) is None


def test_a_tied_adapter_is_not_loaded_where_nothing_is_tied(tmp_path: Path) -> None:
    model, sites, _ = made("tied gpt2")
    gp.save(adapt(model, sites), tmp_path)
    other = gpt2(tie_word_embeddings=False)
    with pytest.raises(FileError, match=r"one adapter serves transformer\.wte\.weight and lm_head\.weight.*tie_word"):
        gp.load(other, tmp_path)
    assert find_state(other) is None


def test_places_that_read_a_tied_weight_either_way_round_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    one = site(model, "0.weight", "up", "branch")
    with pytest.raises(AdapterError, match=r"read as \(out, in\) by one module and as \(in, out\)"):
        adapt(model, [replace(one, tied=(site(model, "1.weight", "down", "branch", transposed=True),))])


def test_a_tied_adapter_goes_through_the_trainer_files_of_transformers(tmp_path: Path) -> None:
    model, sites, example = made("tied gpt2", torch.float32)
    adapt(model, sites)
    randomize(model)
    model.save_pretrained(tmp_path)
    fresh = adapt(made("tied gpt2", torch.float32)[0], sites)
    from safetensors.torch import load_file

    missing, unexpected = fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert missing == ["lm_head.weight"]  # the base's own, which transformers ties again itself
    assert not unexpected
    assert same(outputs(fresh, example), outputs(model, example))


def test_casts_of_a_tied_weight_follow_a_change_of_dtype() -> None:
    """The first module converted takes weight and adapter along; the second one's graph has casts to lose."""
    model, sites, example = made("tied gpt2", torch.bfloat16)
    adapt(model, sites)
    randomize(model)
    model.float()
    expected = outputs(with_dense_updates("tied gpt2", model, LORA, torch.float32), example)
    # float32; a cast to bfloat16 that was left behind would cost 1e-2.
    assert delta(outputs(model, example), expected) < 1e-5 * max(float(t.abs().max()) for t in expected)


# -- what cannot be, and says so -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("embedding", r"table\.weight is an embedding table.*no features.*dropout=0"),
        ("tied gpt2", r"wte\.weight is an embedding table.*dropout=0"),
        ("conv2d, kernel 1", r"0\.weight takes the weight form.*dropout=0"),
        ("mixtral eager", r"gate_up_proj takes the weight form.*dropout=0"),
    ],
)
def test_dropout_is_refused(name: str, message: str) -> None:
    model, sites, _ = made(name)
    before = Snapshot.of(model)
    with pytest.raises(AdapterError, match=message):
        adapt(model, sites, LoRA(dropout=0.1))
    before.check(model)


def test_a_stack_has_no_branch_form() -> None:
    model, sites, _ = made("mixtral eager")
    with pytest.raises(AdapterError, match="is a stack of 4 matrices, which a side path cannot serve"):
        adapt(model, [replace(sites[0], form="branch")])


def test_other_shapes_are_refused_on_loading(tmp_path: Path) -> None:
    for name, other, message in (
        ("conv2d, kernel 1", "conv2d, stride 2", r"\(12, 8\), and this model has \(12, 8, 3, 3\)"),
        ("mixtral eager", "gpt-oss eager", r"\(4, 48, 32\), and this model has \(4, 32, 48\)"),
    ):
        model, sites, _ = made(name)
        gp.save(adapt(model, sites), tmp_path / name)
        with pytest.raises(FileError, match=message):
            gp.load(made(other)[0], tmp_path / name)


def test_a_file_from_before_stacks_and_tied_weights_is_read(tmp_path: Path) -> None:
    model = gpt2()
    adapt(
        model, [site(model, "transformer.h.0.attn.c_attn.weight", "v", "branch", transposed=True, rows=((128, 192),))]
    )
    randomize(model)
    gp.save(model, tmp_path)
    file = tmp_path / "adapter.json"
    about = json.loads(file.read_text())
    for saved in about["sites"]:
        assert saved.pop("stack") is None
        assert saved.pop("tied") == []
    file.write_text(json.dumps(about))
    torch.manual_seed(0)
    again = gpt2()
    again.load_state_dict({n: t for n, t in model.state_dict().items() if ".adapters." not in n})
    gp.load(again, tmp_path)
    example = ((), {"input_ids": IDS})
    assert same(outputs(again.eval(), example), outputs(model.eval(), example))


# -- export --------------------------------------------------------------------------------------------------------


FOLDED = ("embedding", "conv2d grouped", "mixtral batched", "tied gpt2", "gpt-oss batched")


@pytest.mark.parametrize("name", sampled(FOLDED, "mixtral batched", "tied gpt2", "gpt-oss batched"))
def test_export_folded_in(name: str, tmp_path: Path) -> None:
    model, sites, (args, kwargs) = made(name, torch.float32)
    adapt(model, sites)
    randomize(model, std=0.1)
    before = outputs(model, (args, kwargs))
    report = gp.export(model, tmp_path, merged=True, inputs=args or kwargs)
    assert {check.test for check in report.checks} == {"numbers", "effect"}
    assert same(outputs(model, (args, kwargs)), before)


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Conv1d(8, 12, 3, padding=1, groups=2), nn.Conv1d(12, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.inner(x)))


def test_export_with_a_slot_at_a_convolution(tmp_path: Path) -> None:
    model = Convolved().eval()
    adapt(model, [site(model, "inner.weight", "conv")])
    randomize(model)
    report = gp.export(model, tmp_path, inputs=(torch.randn(2, 8, 9),))
    assert {check.test for check in report.checks} == {"slots", "numbers", "effect", "swap"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("embedding", r"table\.weight is an embedding table, .*merged=True"),
        ("mixtral batched", r"layers\.0\.mlp\.experts\.gate_up_proj is a stack of matrices, .*merged=True"),
        ("tied gpt2", r"transformer\.wte\.weight is an embedding table, .*merged=True"),
        ("tied head", r"lm_head\.weight is a tied weight, .*merged=True"),
    ],
)
def test_export_with_slots_says_what_has_none(name: str, message: str, tmp_path: Path) -> None:
    model, sites, (args, kwargs) = made("tied gpt2" if name == "tied head" else name, torch.float32)
    if name == "tied head":
        sites = [replace(sites[0].tied[0], tied=(replace(sites[0], tied=()),))]
    adapt(model, sites)
    randomize(model)
    with pytest.raises(ExportError, match=message):
        gp.export(model, tmp_path / "out", inputs=args or kwargs)
    assert not (tmp_path / "out").exists()


def test_a_slot_at_a_head_does_not_skip_its_embedding(tmp_path: Path) -> None:
    """In one graph the two are one weight, and a site of either is of both."""
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    model = torch.export.export(Tied().eval(), (IDS,), dynamic_shapes=(dynamic,)).module()
    name = next(n for n, _ in model.named_parameters())
    adapt(model, [replace(site(model, name, "head", "branch"), owner="")])
    randomize(model)
    with pytest.raises(ExportError, match="also an embedding table, which has no slot; export with merged=True"):
        gp.export(model, tmp_path / "out", inputs=(IDS,))
    assert gp.export(model, tmp_path / "merged", merged=True, inputs=(IDS,)).checks


# -- PEFT as the oracle --------------------------------------------------------------------------------------------


def peft_twin(name: str, **config: Any) -> tuple[nn.Module, Any, list[Site], Call]:
    """(the model for graphpeft, the same one with PEFT's adapter of random numbers, sites, example), in float32."""
    import peft

    model, sites, example = made(name, torch.float32)
    twin = peft.get_peft_model(made(name, torch.float32)[0], peft.LoraConfig(r=3, lora_alpha=6, **config))
    generator = torch.Generator().manual_seed(5)
    for n, p in twin.named_parameters():
        if "lora_" in n:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    adapt(model, sites)
    return model, twin.eval(), sites, example


def check_against_peft(model: nn.Module, twin: nn.Module, example: Call) -> None:
    with gp.disabled(model):
        base = outputs(model, example)
    expected = outputs(twin, example)
    assert delta(expected, base) > 1e-2
    # float32, and the same sums in another order.
    assert delta(outputs(model, example), expected) < 1e-5 * max(float(t.abs().max()) for t in expected)
    gp.merge(model)
    assert delta(outputs(model, example), expected) < 1e-5 * max(float(t.abs().max()) for t in expected)


@pytest.mark.parametrize("name", ["embedding", "embedding padded"])
def test_an_embedding_as_in_peft(name: str) -> None:
    model, twin, sites, example = peft_twin(name, target_modules=["table"])
    theirs, (b, a) = twin.base_model.model.table, chains(model, "default")[sites[0]].parameters()
    b.data.copy_(theirs.lora_embedding_A["default"].T)
    a.data.copy_(theirs.lora_embedding_B["default"].T)
    found = [floats(m(*example[0]))[0].pow(2).sum() for m in (model, twin)]
    for loss in found:
        loss.backward()
    # float32; sums over 14 tokens
    assert (
        delta([b.grad, a.grad], [theirs.lora_embedding_A["default"].grad.T, theirs.lora_embedding_B["default"].grad.T])
        < 1e-4
    )
    check_against_peft(model, twin, example)


@pytest.mark.parametrize("name", ["conv2d, kernel 1", "conv2d, stride 2", "conv1d, kernel 3"])
def test_a_convolution_as_in_peft(name: str) -> None:
    """PEFT's A is a convolution to r channels, which pads with zeros in any mode; B is one of kernel 1."""
    model, twin, sites, example = peft_twin(name, target_modules=["0"])
    theirs, (b, a) = twin.base_model.model[0], chains(model, "default")[sites[0]].parameters()
    a.data.copy_(theirs.lora_A["default"].weight.flatten(1))
    b.data.copy_(theirs.lora_B["default"].weight.flatten(1))
    check_against_peft(model, twin, example)


@pytest.mark.parametrize("implementation", ["eager", "batched", "grouped"])
@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_experts_as_in_peft(family: str, implementation: str) -> None:
    model, twin, _, example = peft_twin(
        f"{family} {implementation}", target_modules=[], target_parameters=["experts.down_proj"]
    )
    ours = {s: c for s, c in chains(model, "default").items() if s.role == "down"}
    for one, chain in ours.items():
        b, a = chain.parameters()
        theirs = twin.base_model.model.get_submodule(one.owner)
        # PEFT interleaves the experts' columns of B, and stacks the rows of A.
        a.data.copy_(theirs.lora_A["default"].weight.unflatten(0, (4, 3)))
        b.data.copy_(theirs.lora_B["default"].weight.unflatten(1, (3, 4)).permute(2, 0, 1))
    check_against_peft(model, twin, example)


# -- reading lookups -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda ids, w: nn.functional.embedding(ids, w), [None]),
        (lambda ids, w: nn.functional.embedding(ids, w, 3), [3]),
        (lambda ids, w: nn.functional.embedding(ids, weight=w, padding_idx=-1), [-1]),
        (lambda ids, w: nn.functional.embedding(ids, w.to(torch.float32)), [None]),
        (lambda ids, w: torch.embedding(w, ids), [None]),
        (lambda ids, w: torch.embedding(w, ids, 2), [2]),
        (lambda ids, w: torch.embedding(w, ids, -1), [None]),
        (lambda ids, w: torch.ops.aten.embedding.default(w, ids, 2), [2]),
        (lambda ids, w: nn.functional.embedding(ids, w, None, 1.0), []),
        (lambda ids, w: nn.functional.embedding(ids, w, max_norm=1.0), []),
        (lambda ids, w: nn.functional.embedding(ids, w.t()), []),
        (lambda ids, w: w[ids], []),
    ],
)
def test_lookups_are_read_off_the_graph(call: Any, expected: list[int | None]) -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 5))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return call(ids, self.weight)

    owner = Table()
    graph = trace(owner)
    assert graph is not None
    found = lookups(owner, graph.nodes, owner.weight)
    assert [f.padding_idx for f in found] == expected
    assert all(f.ids.op == "placeholder" for f in found)
    assert lookups(owner, graph.nodes, nn.Parameter(owner.weight.detach())) == []
