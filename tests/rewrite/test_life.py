"""What users do with an adapted model besides training it: generate, copy, store, compile, cast, stack adapters."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import Snapshot, adapters, build, call, delta, inputs, outputs, randomize, same
from torch import nn
from torch.nn.utils import prune

import graphpeft as gp
from graphpeft.rewrite.state import get_state

RULES = "attn:lora(r=4); up+down:rlora"


def adapted(name: str, rules: str = RULES, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = build(name, dtype=dtype)
    gp.apply(model, rules, inputs=inputs(name, model))
    randomize(model)
    return model


def generate(model: Any, **options: Any) -> list[list[int]]:
    prompt = torch.tensor([[5, 9, 31, 7], [8, 3, 77, 20]])
    options = dict(max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None) | options
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options).tolist()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation(name: str) -> None:
    """In float64, so that no two tokens tie within rounding."""
    model = adapted(name, dtype=torch.float64)
    tokens = generate(model)
    assert tokens == generate(model, use_cache=False)
    with gp.disabled(model):
        assert generate(model) != tokens
    gp.merge(model)
    assert generate(model) == tokens


@pytest.mark.parametrize("name", ["llama", "gpt2", "hand_written", "torch_encoder"])
def test_copies_are_independent(name: str) -> None:
    """Owners of every kind: a Linear, a Conv1D, the root, a weight form."""
    model = adapted(name, "qv:lora")
    example = call(name, model)
    before = outputs(model, example)
    clone = copy.deepcopy(model)
    assert same(outputs(clone, example), before)
    assert not {p.data_ptr() for p in clone.parameters()} & {p.data_ptr() for p in model.parameters()}
    randomize(clone, seed=1)
    moved = outputs(clone, example)
    assert delta(moved, before) > 1e-4
    assert same(outputs(model, example), before)
    gp.remove(model)
    assert same(outputs(clone, example), moved)
    gp.remove(clone)
    assert same(outputs(clone, example), outputs(model, example))


def test_copy_of_a_merged_model() -> None:
    model = adapted("llama")
    example = call("llama", model)
    before = outputs(model, example)
    gp.merge(model)
    clone = copy.deepcopy(model)
    gp.unmerge(model)
    randomize(model, seed=1)
    assert same(outputs(clone, example), merged := outputs(clone, example))
    # float32: a rounding per weight, through two layers.
    assert delta(merged, before) < 1e-5
    gp.unmerge(clone)
    assert same(outputs(clone, example), before)
    gp.remove(clone)
    gp.remove(model)
    assert same(outputs(clone, example), outputs(model, example))


@pytest.mark.parametrize("name", ["gpt2", "hand_written", "torch_encoder"])
def test_pickling(name: str) -> None:
    model = adapted(name, "qv:lora")
    example = call(name, model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    before = outputs(model, example)
    assert same(outputs(loaded, example), before)
    gp.activate(loaded, None)
    with gp.disabled(model):
        assert same(outputs(loaded, example), outputs(model, example))
    gp.activate(loaded, "default")
    assert same(outputs(loaded, example), before)


def test_state_dict_round_trip() -> None:
    model, other = adapted("llama"), adapted("llama")
    randomize(other, seed=1)
    example = call("llama", model)
    assert not same(outputs(model, example), outputs(other, example))
    assert not any(other.load_state_dict(model.state_dict()))
    assert same(outputs(model, example), outputs(other, example))


@pytest.mark.parametrize(("name", "backend"), [("llama", "eager"), ("gpt2", "aot_eager")])
def test_compile_without_graph_breaks(name: str, backend: str) -> None:
    """Inductor takes over a minute here, and sees the same graph; aot_eager traces the backward pass too."""
    model = adapted(name)
    example = call(name, model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    # The same kernels in the same order.
    assert delta(outputs(compiled, example), outputs(model, example)) < 1e-6


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_casting_after_apply(name: str) -> None:
    model = adapted(name)
    example = call(name, model)
    before = outputs(model, example)
    scale = max(float(t.abs().max()) for t in before)
    model.to(torch.bfloat16)
    assert {p.dtype for p in adapters(model).values()} == {torch.bfloat16}
    # bfloat16 keeps 8 bits: 0.4 % per operation, some ten of them on top of one another.
    assert delta(outputs(model, example), before) < 0.1 * scale
    model.double()
    outputs(model, example)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_autocast() -> None:
    model = adapted("gpt2")
    example = call("gpt2", model)
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(model, example)
        loss = model(**example[1], labels=example[1]["input_ids"]).loss
    expected = outputs(model, example)
    # bfloat16 keeps 8 bits: 0.4 % per operation, some ten of them on top of one another.
    assert delta(found, expected) < 0.1 * max(float(t.abs().max()) for t in expected)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapters(model).values())


# -- several adapters ----------------------------------------------------------------------------------------------


def two(name: str = "gpt2") -> tuple[nn.Module, Any]:
    """A float64 model with adapters `one` (q and v) and `two` (v and o); `two` is active."""
    model = build(name, dtype=torch.float64)
    gp.apply(model, "qv:lora(r=2)", name="one")
    gp.apply(model, "vo:rlora", name="two")
    randomize(model, "one")
    randomize(model, "two", seed=1)
    return model, call(name, model)


def test_activate_one_both_none() -> None:
    model, example = two()
    results = {}
    for chosen in ("one", "two", ("one", "two"), ("two", "one"), None, ()):
        gp.activate(model, chosen)
        active = (chosen,) if isinstance(chosen, str) else chosen or ()
        assert {p.requires_grad for n in active for p in adapters(model, n).values()} <= {True}
        idle = {"one", "two"} - set(active)
        assert {p.requires_grad for n in idle for p in adapters(model, n).values()} <= {False}
        results[chosen] = outputs(model, example)
    assert same(results[None], results[()])
    distinct = [results[key] for key in ("one", "two", ("one", "two"), None)]
    assert all(delta(a, b) > 1e-4 for i, a in enumerate(distinct) for b in distinct[:i])
    # float64: the order of two additions.
    assert delta(results["one", "two"], results["two", "one"]) < 1e-12
    assert same(results[None], outputs(build("gpt2", dtype=torch.float64), example))


def test_updates_add_up() -> None:
    """At one projection, two adapters together move the output by the sum of what each moves it by."""
    model, example = two()
    layer = model.transformer.h[0].attn.c_attn
    seen: dict[Any, torch.Tensor] = {}
    key: Any = None
    layer.register_forward_hook(lambda module, args, output: seen.__setitem__(key, output.detach()))
    for key in (None, "one", "two", ("one", "two")):
        gp.activate(model, key)
        outputs(model, example)
    one, both = seen["one"] - seen[None], seen["one", "two"] - seen[None]
    # float64
    assert (both - one - (seen["two"] - seen[None])).abs().max() < 1e-12
    gp.activate(model, ("one", "two"))
    expected = outputs(model, example)
    gp.merge(model)
    assert delta(outputs(model, example), expected) < 1e-12


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("order", [("one", "two"), ("two", "one")])
def test_an_update_relative_to_the_base_does_not_see_its_neighbor(order: tuple[str, str], exported: bool) -> None:
    """DoRA scales what the base weight makes, whatever else is added there; merging never sees another adapter's sum."""
    model = build("gpt2", dtype=torch.float64)
    example = call("gpt2", model)
    if exported:
        example = (), {**example[1], "use_cache": False}
        model = torch.export.export(model, *example).module()
    for name, method in (("one", "dora(r=2)"), ("two", "lora(r=2)")):
        gp.apply(model, f"linear:{method}; embed:{method}", name=name)
        randomize(model, name)
    gp.activate(model, order)
    expected = outputs(model, example)
    gp.merge(model)
    # float64; the two ways of taking DoRA's norm differ by rounding.
    assert delta(outputs(model, example), expected) < 1e-12


def test_removing_one_of_two_leaves_the_other() -> None:
    model, example = two()
    base = Snapshot.of(build("gpt2", dtype=torch.float64))
    gp.activate(model, "one")
    alone = outputs(model, example)
    gp.remove(model, "two")
    assert same(outputs(model, example), alone)
    assert not adapters(model, "two")
    gp.remove(model, "one")
    assert list(model.state_dict()) == list(base.tensors)


def test_the_same_seed_gives_the_same_adapter_in_any_order() -> None:
    first, second = build("llama"), build("llama")
    gp.apply(first, "qv:lora", name="a", seed=3)
    gp.apply(first, "o:lora; qv:rlora", name="b", seed=5)
    torch.manual_seed(99)
    gp.apply(second, "qv:rlora; o:lora", name="b", seed=5)
    torch.rand(7)
    gp.apply(second, "qv:lora", name="a", seed=3)
    for name in ("a", "b"):
        one, other = adapters(first, name), adapters(second, name)
        assert set(one) == set(other)
        assert all(torch.equal(one[n], other[n]) for n in one)
    third = build("llama")
    gp.apply(third, "qv:lora", name="a", seed=4)
    assert not same(adapters(third, "a").values(), adapters(first, "a").values())


def test_disabled_is_restored_after_an_error() -> None:
    model = adapted("llama")
    example = call("llama", model)
    before = outputs(model, example)
    with pytest.raises(ZeroDivisionError), gp.disabled(model):
        raise ZeroDivisionError
    assert same(outputs(model, example), before)
    with gp.disabled(model), gp.disabled(model):
        assert delta(outputs(model, example), before) > 0
    assert same(outputs(model, example), before)


@pytest.mark.parametrize("gone", ["replaced", "pruned"])
def test_what_an_adapter_does_not_touch_may_be_gone(gone: str, tmp_path: Path) -> None:
    """A head that was replaced or pruned keeps nobody from swapping, adding and removing adapters elsewhere."""
    model = gp.apply(build("llama"), "q:lora(r=2)")
    gp.save(model, tmp_path)
    if gone == "pruned":
        prune.l1_unstructured(model.lm_head, "weight", 0.5)
    else:
        model.lm_head = nn.Identity()
    base = outputs(model, call("llama", model))[:1]
    gp.swap(model, tmp_path)
    gp.load(model, tmp_path, "second")
    gp.remove(model, "second")
    assert list(get_state(model).adapters) == ["default"]
    gp.remove(model)
    assert same(outputs(model, call("llama", model))[:1], base)
    assert not hasattr(model, "_graphpeft")
