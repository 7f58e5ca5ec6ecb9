"""Several adapters at once, and contexts around them: what a reader found who tried to make them disagree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checks import Snapshot, adapters, build, call, delta, outputs, randomize, same
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import graphpeft as gp
from graphpeft.errors import AdapterError


def adapted(name: str = "llama", rules: str = "qv:lora(r=2)", adapter: str = "a") -> nn.Module:
    model = gp.apply(build(name), rules, name=adapter)
    randomize(model, adapter)
    return model


def untied(folder: Path) -> Path:
    """An adapter of PEFT on GPT-2's table of tokens alone, which the head does not follow."""
    config = LoraConfig(r=2, target_modules=["wte"], init_lora_weights=False)
    get_peft_model(build("gpt2"), config).save_pretrained(folder)
    return folder


def test_a_name_given_twice_counts_once() -> None:
    model = adapted()
    want = outputs(model, call("llama", model))
    gp.activate(model, ["a", "a"])
    assert same(outputs(model, call("llama", model)), want)
    gp.merge(model, ["a", "a"])
    assert delta(outputs(model, call("llama", model)), want) < 1e-4  # sums in another order


INSIDE: dict[str, Callable[[nn.Module], object]] = {
    "rename": lambda model: gp.rename(model, "a", "b"),
    "remove": gp.remove,
    "merge": gp.merge,
    "activate": lambda model: gp.activate(model, "a"),
    "apply": lambda model: gp.apply(model, "o:lora", name="c"),
    "combine": lambda model: gp.combine(model, {"a": 1.0}, "c"),
}


@pytest.mark.parametrize("act", INSIDE.values(), ids=INSIDE.keys())
@pytest.mark.parametrize("context", ["disabled", "per_row"])
def test_contexts_put_back_what_they_found(context: str, act: Callable[[nn.Module], object]) -> None:
    model = adapted()
    before, want = Snapshot.of(model), outputs(model, call("llama", model))
    with gp.disabled(model) if context == "disabled" else gp.per_row(model, ["a", None]):
        with pytest.raises(AdapterError, match=rf"inside of `with gp\.{context}"):
            act(model)
        with gp.disabled(model):
            assert delta(outputs(model, call("llama", model)), want) > 0.01
    before.check(model, adapted=True)
    assert same(outputs(model, call("llama", model)), want)
    gp.rename(model, "a", "b")


def test_a_tied_weight_and_one_that_is_not_are_not_one_site(tmp_path: Path) -> None:
    model = adapted("gpt2", "embed:lora(r=2)")
    gp.load(model, untied(tmp_path), name="p")
    want = outputs(model, call("gpt2", model))
    for act in (lambda: gp.swap(model, tmp_path, "a"), lambda: gp.combine(model, {"a": 1.0, "p": 1.0}, "c")):
        with pytest.raises(AdapterError, match="tied"):
            act()
        assert same(outputs(model, call("gpt2", model)), want)
        assert [bool(adapters(model, name)) for name in "apc"] == [True, True, False]


def test_numbers_under_noise_are_not_swapped(tmp_path: Path) -> None:
    gp.save(adapted(), tmp_path)
    model = adapted()
    gp.PAC(examples=100).attach(model, "a")
    want = outputs(model, call("llama", model))
    with pytest.raises(AdapterError, match="has a PAC-Bayes objective"):
        gp.swap(model, tmp_path, "a")
    assert same(outputs(model, call("llama", model)), want)


PATTERNS = [
    {},
    {"alpha_pattern": {"up_proj.weight": 11}},
    {"alpha_pattern": {"up_proj": 11}},  # of no effect there
    {"rank_pattern": {"up_proj.weight": 2}},
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_patterns_call_a_target_parameter_by_its_weight(pattern: dict[str, dict[str, int]], tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"], init_lora_weights=False, **pattern
    )  # fmt: skip
    theirs = get_peft_model(build("llama"), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = gp.load(build("llama"), tmp_path)
    # The same products, summed in another order.
    assert delta(outputs(ours, call("llama", ours)), outputs(theirs, call("llama", ours))) < 1e-5


def test_linear_combination_of_other_scales_is_that_of_peft(tmp_path: Path) -> None:
    def config(alpha: int) -> LoraConfig:
        return LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

    theirs: PeftModel = get_peft_model(build("llama"), config(4), adapter_name="a")
    theirs.add_adapter("b", config(16))
    theirs.eval().save_pretrained(tmp_path)
    ours = build("llama")
    for name in "ab":
        gp.load(ours, tmp_path / name, name=name)
    before = outputs(ours, call("llama", ours))
    gp.combine(ours, {"a": 0.6, "b": 0.4}, "c", "linear")
    theirs.base_model.add_weighted_adapter(["a", "b"], [0.6, 0.4], "c", combination_type="linear")
    theirs.set_adapter("c")
    with torch.no_grad():
        found, want = outputs(ours, call("llama", ours)), outputs(theirs, call("llama", ours))
    assert delta(found, want) < 1e-5  # sums in another order
    assert delta(found, before) > 0.01


@pytest.mark.parametrize(("options", "wrong"), [({"rank": -1, "how": "svd"}, "rank = -1"), ({}, "weight of 'a'")])
def test_combinations_of_no_number_are_refused(options: dict[str, object], wrong: str) -> None:
    weights = {"a": 1.0 if options else float("nan")}
    with pytest.raises(AdapterError, match=wrong):
        gp.combine(adapted(), weights, "c", **options)  # type: ignore[arg-type]
