"""One adapter of several: against sums written down, and against PEFT's `add_weighted_adapter` on the same tensors."""

from __future__ import annotations

import copy
from functools import cache

import peft
import pytest
import torch
from torch import nn
from zoo import gpt2, llama

import graphpeft as gp
from graphpeft.errors import AdapterError
from graphpeft.passes.combine import How
from graphpeft.rewrite.state import chains

TOKENS = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))


def two(rules: tuple[str, str] = ("qv:lora(r=4)", "qv:lora(r=4)"), make: object = llama) -> nn.Module:
    """A copy, for the captures take most of the time."""
    return copy.deepcopy(_two(rules, make))


@cache
def _two(rules: tuple[str, str], make: object) -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()  # type: ignore[operator]
    for name, rule in zip("ab", rules, strict=True):
        gp.apply(model, rule, name=name)
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            nn.init.normal_(parameter, std=0.2)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def deltas(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {site.key: chain.eval().delta() for site, chain in chains(model, name).items()}


def in_peft(model: nn.Module) -> peft.PeftModel:
    """The same base and adapters in PEFT."""
    base = copy.deepcopy(model)
    gp.remove(base)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    other = peft.get_peft_model(base, config, adapter_name="a")
    other.add_adapter("b", config)
    for name in "ab":
        for site, chain in chains(model, name).items():
            layer = other.get_submodule(f"base_model.model.{site.owner}")
            layer.lora_B[name].weight.data.copy_(chain.factors[0].weight)
            layer.lora_A[name].weight.data.copy_(chain.factors[1].weight)
    return other.eval()


@pytest.mark.parametrize(
    ("how", "peft_how", "options"),
    [
        ("cat", "cat", {}),
        ("linear", "linear", {}),
        ("svd", "svd", {"rank": 3}),
        ("ties", "ties_svd", {"rank": 4, "density": 0.3}),
    ],
)
def test_peft_combines_to_the_same_logits(how: How, peft_how: str, options: dict[str, float]) -> None:
    model = two()
    other = in_peft(model)
    gp.combine(model, {"a": 0.7, "b": 0.6}, "c", how, **options)  # type: ignore[arg-type]
    given = {"svd_rank": options.get("rank"), "density": options.get("density")}
    other.add_weighted_adapter(
        ["a", "b"], [0.7, 0.6], "c", combination_type=peft_how, **{k: v for k, v in given.items() if v is not None}
    )
    other.set_adapter("c")
    with torch.no_grad():
        want = other(TOKENS).logits
    # Both decompose in float32, and add in other orders.
    torch.testing.assert_close(logits(model), want, atol=2e-5, rtol=1e-4)
    with gp.disabled(model):
        assert (logits(model) - want).abs().max() > 0.01


def test_cat_is_the_exact_sum_of_whatever_lowers_to_lora() -> None:
    """Fused rows, several methods, a site that only one adapter has, a weight below zero."""
    model = two(("qv:melora(n=2, r=2); mlp:lora(r=2)", "v:rlora(r=8); k:vera(r=4)"), gpt2)
    one, other = deltas(model, "a"), deltas(model, "b")
    gp.combine(model, {"a": 0.5, "b": -2.0}, "c")
    made = deltas(model, "c")
    assert set(made) == {*one, *other}
    for key, delta in made.items():
        want = 0.5 * one.get(key, torch.zeros_like(delta)) - 2 * other.get(key, torch.zeros_like(delta))
        torch.testing.assert_close(delta, want, atol=1e-5, rtol=1e-5)


def test_svd_is_nearer_than_anything_of_its_rank_that_cat_gives() -> None:
    model = two()
    exact = {
        key: 0.5 * (a + b) for (key, a), b in zip(deltas(model, "a").items(), deltas(model, "b").values(), strict=True)
    }
    gp.combine(model, {"a": 0.5, "b": 0.5}, "c", "svd", rank=2)
    for key, delta in deltas(model, "c").items():
        u, s, v = torch.linalg.svd(exact[key])
        torch.testing.assert_close(delta, (u[:, :2] * s[:2]) @ v[:2], atol=1e-5, rtol=1e-4)
        assert torch.linalg.matrix_rank(delta, atol=1e-4) == 2


def test_dare_keeps_the_mean_and_is_a_function_of_its_seed() -> None:
    model = two()
    for seed, name in ((0, "c"), (0, "d"), (1, "e")):
        gp.combine(model, {"a": 1.0, "b": 1.0}, name, "dare", rank=32, density=0.5, seed=seed)
    c, d, e = (deltas(model, name) for name in "cde")
    for key, delta in c.items():
        assert torch.equal(delta, d[key])
        assert not torch.equal(delta, e[key])
    exact = torch.cat(
        [(a + b).flatten() for a, b in zip(deltas(model, "a").values(), deltas(model, "b").values(), strict=True)]
    )
    drawn = torch.cat([delta.flatten() for delta in c.values()])
    assert torch.dot(drawn, exact) / torch.dot(exact, exact) == pytest.approx(1, abs=0.05)


def test_the_combined_adapter_is_one_like_others(tmp_path: object) -> None:
    model = two()
    gp.combine(model, {"a": 0.5, "b": 0.5}, "c")
    want = logits(model)
    gp.remove(model, "a")
    gp.remove(model, "b")
    gp.save(model, tmp_path, "c")  # type: ignore[arg-type]
    gp.remove(model)
    torch.testing.assert_close(logits(gp.load(model, tmp_path)), want)  # type: ignore[arg-type]


def test_what_cannot_be_combined_changes_nothing() -> None:
    model = two(("qv:lora(r=4)", "qv:lora(r=2); down:dora"))
    before = logits(model)
    for weights, options, text in (
        ({"a": 1, "z": 1}, {}, "no adapter 'z'"),
        ({}, {}, "No adapters are named"),
        ({"a": 1, "b": 1}, {}, "down_proj.weight .*combine with how='svd'"),
        ({"a": 1, "b": 1}, {"how": "sum"}, "how = 'sum' is not a way"),
        ({"a": 1, "b": 1}, {"how": "ties", "density": 0}, "density = 0"),
    ):
        with pytest.raises(AdapterError, match=text):
            gp.combine(model, weights, "c", **options)  # type: ignore[arg-type]
    gp.combine(model, {"a": 1, "b": 1}, "c", "svd")
    gp.remove(model, "c")
    gp.activate(model, "b")
    assert torch.equal(logits(model), before)
    with pytest.raises(AdapterError, match=r"ranks 4, 2 cannot be added"):
        gp.combine(two(("qv:lora(r=4)", "qv:lora(r=2)")), {"a": 1, "b": 1}, "c", "linear")
