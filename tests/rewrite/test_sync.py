"""What owners run is derived from the record: at once, within bounds, and whatever interrupts the work."""

from __future__ import annotations

import copy
import gc
import linecache
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from checks import adapters, delta, outputs, randomize, same
from interrupts import interrupted
from torch import Tensor, nn
from zoo import gpt2, llama

import graphpeft as gp
from graphpeft.errors import AdapterError
from graphpeft.rewrite import owner
from graphpeft.rewrite.state import chains, find_state, get_state

CALL = ((), {"input_ids": torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0)), "use_cache": False})


def two(make: Callable[..., nn.Module] = llama, rules: str = "qv:lora(r=2)") -> nn.Module:
    torch.manual_seed(0)
    model = make(layers=1).eval()
    for seed, name in enumerate("ab"):
        gp.apply(model, rules, name=name)
        randomize(model, name, std=0.3, seed=seed)
    return model


def of(model: nn.Module) -> list[Tensor]:
    return outputs(model, CALL)


@pytest.mark.parametrize("rules", ["qv:lora(r=2)", "qv:dora(r=2)", "up:rlora", "embed:lora(r=2)"])
def test_a_scale_that_is_changed_acts_at_once_and_goes_into_the_file(rules: str, tmp_path: Path) -> None:
    model = gp.apply(llama(layers=1).eval(), rules)
    randomize(model)
    before = of(model)
    for chain in chains(model, "default").values():
        chain.scale *= 0.25
    after = of(model)
    assert delta(after, before) > 1e-3
    gp.merge(model)
    assert delta(of(model), after) < 1e-5  # float32
    gp.unmerge(model)
    gp.save(model, tmp_path)
    torch.manual_seed(0)
    other = copy.deepcopy(model)
    gp.remove(other)
    assert same(of(gp.load(other, tmp_path)), after)


def test_strengths_and_names_make_no_classes_that_stay() -> None:
    def kept() -> tuple[int, int]:
        gc.collect()
        return len(owner._shared), sum(
            "graphpeft" in str(name) for name in linecache.cache if str(name).startswith("<")
        )

    start = kept()
    model = two()
    counts = []
    for step in range(60):
        gp.activate(model, {"a": 1 + step / 7, "b": step / 3})
        gp.activate(model, "ab"[step % 2])
        gp.rename(model, "a", "c")
        gp.rename(model, "c", "a")
        counts.append(kept() if step % 20 == 0 else None)
    assert len({count for count in counts[20:] if count}) == 1
    seen = weakref.ref(type(model.get_submodule("model.layers.0.self_attn.q_proj")))
    del model
    assert kept() == start
    assert seen() is None


def test_a_strength_lives_as_long_as_its_activation() -> None:
    model = two()
    gp.activate(model, "a")
    whole = of(model)
    gp.activate(model, {"a": 0.25})
    assert "a (active at strength 0.25)" in str(gp.explain(model))
    assert delta(of(model), whole) > 1e-3
    gp.activate(model, "b")
    assert "strength" not in str(gp.explain(model))
    with gp.per_row(model, ["a", "a"]):
        assert same(of(model), whole)
    gp.activate(model, "a")
    assert same(of(model), whole)
    gp.activate(model, {"a": 0.25})
    quarter = of(model)
    with gp.disabled(model):
        pass
    assert same(of(model), quarter), "a context gives the strength back"


def test_a_reference_pass_leaves_what_trains() -> None:
    model = two()
    gp.activate(model, {"a": 0.5})
    now, trains = of(model), [p.requires_grad for p in model.parameters()]
    with gp.disabled(model):
        base = of(model)
    loss = model(**CALL[1]).logits.square().mean()
    with gp.reference(model):
        assert not torch.is_grad_enabled()
        assert same(of(model), base)
    with gp.reference(model, of="b"):
        other = of(model)
        with pytest.raises(AdapterError, match=r"inside of `with gp\.reference"):
            gp.activate(model, "b")
    assert delta(other, base) > 1e-3
    assert same(of(model), now)
    assert [p.requires_grad for p in model.parameters()] == trains
    loss.backward()
    assert all(p.grad is not None for p in adapters(model, "a").values())
    with pytest.raises(AdapterError, match="no adapter 'x'"), gp.reference(model, of="x"):
        pass


def test_two_roots_over_one_owner_are_refused() -> None:
    model = llama(layers=1).eval()
    gp.apply(model.model, "q:lora(r=2)")
    randomize(model.model)
    before = of(model)
    with pytest.raises(AdapterError, match=r"self_attn\.q_proj already has the adapter 'default'.*its submodule model"):
        gp.apply(model, "q:lora(r=2)")
    assert find_state(model) is None
    gp.apply(model, "head:lora(r=2)", name="head")  # other owners are no matter
    assert same(of(model), before)
    outer = gp.apply(llama(layers=1).eval(), "q:lora(r=2)")
    with pytest.raises(AdapterError, match="of a model around this LlamaModel"):
        gp.apply(outer.model, "v:lora(r=2)")


# -- interrupts --------------------------------------------------------------------------------------------------------


def states(model: nn.Module) -> list[list[Tensor]]:
    """What the model computes now, as its base, and with each adapter."""
    made = [of(model)]
    for name in (None, *sorted(get_state(model).adapters)):
        gp.activate(model, name)
        made.append(of(model))
    return made


def in_disabled(model: nn.Module) -> None:
    with gp.disabled(model):
        pass


def in_rows(model: nn.Module) -> None:
    with gp.per_row(model, ["a", "b"]):
        pass


ACTS: dict[str, Callable[[nn.Module], Any]] = {
    "activate": lambda m: gp.activate(m, {"b": 0.5}),
    "activate both": lambda m: gp.activate(m, ["b", "a"]),
    "disabled": in_disabled,
    "per_row": in_rows,
    "rename": lambda m: gp.rename(m, "a", "z"),
    "remove": lambda m: gp.remove(m, "a"),
    "remove all": lambda m: gp.remove(m),
    "lower": lambda m: gp.lower(m, "a"),
    "apply": lambda m: gp.apply(m, "k:lora(r=2)", name="c"),
    "merge": gp.merge,
    "merge for good": lambda m: gp.merge(m, keep=False),
}


def alike(model: nn.Module, other: nn.Module) -> bool:
    """Whether two models compute the same now, and in all their states."""
    if not same(of(model), of(other)):
        return False
    one, two = find_state(model), find_state(other)
    if one is None or two is None:
        return one is two and [type(m) for m in model.modules()] == [type(m) for m in other.modules()]
    if one.merged or two.merged:
        return one.merged == two.merged
    if (sorted(one.adapters), dict(one.active)) != (sorted(two.adapters), dict(two.active)):
        return False
    trains = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (model, other)]
    return trains[0] == trains[1] and all(same(a, b) for a, b in zip(states(model), states(other), strict=True))


def sweep(act: Callable[[nn.Module], Any], rules: str, lines: Callable[[int], Any]) -> None:
    model = two(rules=rules)
    done = copy.deepcopy(model)
    total = interrupted(lambda: act(done), 0)
    assert total is not None
    for at in lines(total):
        tried = copy.deepcopy(model)
        interrupted(lambda tried=tried: act(tried), at)  # type: ignore[misc]
        assert alike(copy.deepcopy(tried), copy.deepcopy(model)) or alike(tried, copy.deepcopy(done)), (
            f"line {at} of {total}"
        )


@pytest.mark.parametrize("act", ACTS)
def test_ctrl_c_leaves_the_state_before_or_after(act: str) -> None:
    rules = "qv:rlora" if act == "lower" else "qv:lora(r=2)"
    # Most lines of `apply` capture the model, and change nothing.
    sweep(
        ACTS[act],
        rules,
        lambda total: sorted({*range(1, total, max(1, total // 5)), *range(max(1, total - 160), total, 31)}),
    )


@pytest.mark.slow
@pytest.mark.parametrize("act", ACTS)
def test_ctrl_c_at_every_line(act: str) -> None:
    rules = "qv:rlora" if act == "lower" else "qv:lora(r=2)"
    sweep(ACTS[act], rules, lambda total: range(max(1, total - 2500), total))


# -- copies --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, gpt2])
def test_copies_made_in_a_context_are_whole_and_unlocked(make: Callable[..., nn.Module]) -> None:
    model = two(make)
    expected = of(model)
    with gp.disabled(model):
        base = of(model)
        clone = copy.deepcopy(model)
    assert same(of(model), expected)
    assert same(of(clone), base)
    gp.activate(clone, "b")
    assert same(of(clone), expected)
    gp.remove(clone)
    assert same(of(clone), base)
    assert same(of(model), expected)


def test_copies_of_a_merged_graph_un_merge(tmp_path: Path) -> None:
    config = tf.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    eager = tf.LlamaForCausalLM(config).eval()
    model = gp.apply(torch.export.export(eager, *CALL, strict=False), "qv:lora(r=2)")
    with torch.no_grad():
        for p in adapters(model).values():
            p.normal_(0, 0.3)
    expected = of(model)
    gp.merge(model)
    clone = copy.deepcopy(copy.deepcopy(model))
    gp.unmerge(clone)
    assert same(of(clone), expected)
    gp.unmerge(model)
    assert same(of(model), expected)
    gp.save(model, tmp_path)
    assert delta(of(gp.load(eager, tmp_path)), expected) < 1e-5  # the exported graph's own kernels


# -- threads ---------------------------------------------------------------------------------------------------------------


def test_a_switch_while_another_thread_generates_is_refused_or_comes_after() -> None:
    model = two()
    alone = {}
    for name in "ab":
        gp.activate(model, name)
        alone[name] = model.generate(CALL[1]["input_ids"], max_new_tokens=12, do_sample=False).tolist()  # type: ignore[operator]
    assert alone["a"] != alone["b"]
    gp.activate(model, "a")
    active, found = ["a"], []

    def generate() -> None:
        for _ in range(6):
            made = model.generate(CALL[1]["input_ids"], max_new_tokens=12, do_sample=False).tolist()  # type: ignore[operator]
            found.append(made)
            time.sleep(0.02)

    thread = threading.Thread(target=generate)
    thread.start()
    refused: list[str] = []
    while thread.is_alive():
        try:
            gp.activate(model, "b" if active[-1] == "a" else "a")
            active.append("b" if active[-1] == "a" else "a")
        except AdapterError as error:
            refused.append(str(error))
        time.sleep(0.003)
    thread.join()
    assert refused
    assert all("is running in another thread" in message for message in refused)
    assert all(made in alone.values() for made in found), "never one part with each"
