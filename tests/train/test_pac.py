"""PAC-Bayes on real graphs: noise in training only, its gradient, the objective's numbers, and what leaves no trace."""

from __future__ import annotations

import copy
from functools import cache
from math import log
from pathlib import Path
from typing import Literal

import pytest
import torch
import transformers as tf
from checks import SMALL, VOCAB, adapters, applied, build, call, delta, outputs, randomize, same, sampled
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import graphpeft as gp
from graphpeft.chain import Factor, Noise, Weighted
from graphpeft.errors import AdapterError, RuleError
from graphpeft.rewrite.state import chains, get_state
from graphpeft.train.pac import _redraw

METHODS = [
    "lora(r=4)",
    "rlora(r=16)",
    "vera(r=16)",
    "melora(n=4, r=2)",
    "melora(n=2, r=(1, 2))",
    "olora(r=4)",
    "dora(r=4)",
]
CASES = [*(("llama", f"qv:{method}") for method in METHODS), ("gpt2", "qv:lora(r=4)"), ("gpt2", f"qv:{METHODS[4]}")]
LIKE = [
    ("llama", "qv:melora(n=4, r=2)"),
    ("llama", "qv:olora(r=4)"),
    ("gpt2", "qv:lora(r=4)"),
    ("mixtral", "experts:lora(r=2)"),
]
EXPERTS = [("mixtral", "experts:lora(r=2)"), ("mixtral", "experts:melora(n=2, r=(1, 2))")]


def fresh(name: str) -> nn.Module:
    if name != "mixtral":
        return build(name)
    torch.manual_seed(0)
    sizes = SMALL | dict(num_hidden_layers=1, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    config = tf.MixtralConfig(vocab_size=VOCAB, **sizes)
    return tf.MixtralForCausalLM(config).eval()


@cache
def made(name: str, rules: str) -> nn.Module:
    return gp.apply(fresh(name), rules)


def fitted(name: str, rules: str) -> nn.Module:
    """The model with an adapter, of which each test has a copy."""
    return copy.deepcopy(made(name, rules))


def noises(model: nn.Module) -> list[Noise]:
    return [m for m in model.modules() if isinstance(m, Noise)]


def noisy(model: nn.Module) -> list[tuple[Tensor, Noise]]:
    held = (m for m in model.modules() if isinstance(m, Weighted))
    return [(m.weight, t) for m in held for t in m.applied if isinstance(t, Noise)]


@pytest.mark.parametrize("case", sampled(CASES + EXPERTS, *LIKE), ids="-".join)
def test_noise_acts_in_training_alone(case: tuple[str, str], tmp_path: Path) -> None:
    name, rules = case
    model = fitted(name, rules)
    trained = sum(p.numel() for p in adapters(model).values())
    randomize(model)
    model.eval()
    example = call(name, model)
    mean = outputs(model, example)
    pac = gp.PAC(examples=50, sigma=0.1).attach(model)
    assert sum(n.log_sigma.numel() for n in noises(model)) == trained
    assert same(outputs(model, example), mean)
    model.train()
    first, second = outputs(model, example), outputs(model, example)
    assert delta(first, second) > 1e-4
    model.eval()
    assert same(outputs(model, example), mean)
    gp.save(model, tmp_path)
    assert not [key for key in load_file(tmp_path / "adapter.safetensors") if "sigma" in key]
    assert same(outputs(gp.load(fresh(name), tmp_path).eval(), example), mean)
    model.train()
    gp.merge(model)  # at the mean, whatever the mode
    model.eval()
    assert delta(outputs(model, example), mean) < 1e-3  # float32, updates of size 1 through two layers
    gp.unmerge(model)
    clone = copy.deepcopy(model).eval()
    assert same(outputs(clone, example), mean)
    pac.detach(model)
    assert not noises(model)
    assert _redraw not in model._forward_pre_hooks.values()
    assert same(outputs(model, example), mean)


def test_gradient_of_sigma_is_that_of_finite_differences() -> None:
    x = torch.randn(2, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # A model in float64 throughout: those of transformers normalize in float32.
    model = gp.apply(build("hand_written", dtype=torch.float64), "q:lora(r=2)", inputs=(x,))
    randomize(model)
    gp.PAC(examples=20, gamma=10.0, sigma=0.1).attach(model)
    first = noises(model)[0]

    def loss() -> torch.Tensor:
        torch.manual_seed(0)  # the same draw every time
        return model(x).square().sum() + gp.penalty(model)

    model.train()
    loss().backward()
    step = 1e-5
    with torch.no_grad():
        first.log_sigma[0, 0] += step
        up = loss()
        first.log_sigma[0, 0] -= 2 * step
        down = loss()
    # Central differences in float64: an error of the order of step².
    assert first.log_sigma.grad is not None
    assert first.log_sigma.grad[0, 0].item() == pytest.approx(((up - down) / (2 * step)).item(), rel=1e-5)


def test_numbers_of_the_objective() -> None:
    model = applied("llama", "q:lora(r=2)").double()
    pac = gp.PAC(examples=20, gamma=10.0, K=0.5, confidence=0.1).attach(model)
    randomize(model, std=0.01)
    kl = pac.kl(model).item()
    assert kl > 0
    whole = kl + log(10)
    assert gp.penalty(model).item() == pytest.approx(whole / 200 + 1.5 * 0.25 * 10)
    best = min(whole / (20 * g) + 1.5 * 0.25 * g for g in [0.01 * i for i in range(1, 5000)])
    assert pac.bound(model, 2.0) == pytest.approx(2 + best, abs=1e-3)
    pac.gamma = "optimal"
    assert gp.penalty(model).item() == pytest.approx(best, abs=1e-3)  # a grid of γ in steps of 0.01
    pac.freeze(model)
    assert gp.penalty(model).item() == 0
    assert not any(n.log_sigma.requires_grad for n in noises(model))
    assert get_state(model).adapters["default"].objective is pac


def test_groups_hold_every_parameter_once() -> None:
    model = applied("llama", "qv:lora(r=4)")
    gp.PAC(examples=20).attach(model)
    slow, fast, noise = gp.parameter_groups(model, 1e-3, weight_decay=0.1, lora_plus=16)
    assert (fast["lr"], noise["weight_decay"]) == (16e-3, 0.0)
    found = [p for g in (slow, fast, noise) for p in g["params"]]
    assert len(found) == len({id(p) for p in found}) == sum(p.requires_grad for p in model.parameters())
    every = chains(model, "default").values()
    assert {id(p) for p in fast["params"]} == {id(c.factors[0].weight) for c in every}
    assert {id(p) for p in slow["params"]} == {id(c.factors[1].weight) for c in every}
    with pytest.raises(RuleError, match="lora_plus = 0"):
        gp.parameter_groups(model, 1e-3, lora_plus=0)


@pytest.mark.parametrize("prior", ["closed", "trained"])
@pytest.mark.parametrize(("name", "rules"), [("llama", "qv:melora(n=2, r=(1, 2))"), EXPERTS[0]])
def test_divergence_is_that_of_gaussians(name: str, rules: str, prior: Literal["closed", "trained"]) -> None:
    model = fitted(name, rules).double()
    pac = gp.PAC(examples=9, prior=prior).attach(model)
    randomize(model, std=0.1)
    expected = torch.zeros((), dtype=torch.float64)
    for weight, noise in noisy(model):
        # A prior for each tensor, and for each matrix of stacked experts.
        matrices = zip(weight, noise.start, noise.log_sigma.exp(), strict=True)
        parts = list(matrices) if name == "mixtral" else [(weight, noise.start, noise.log_sigma.exp())]
        closed = [(sigma**2 + (mean - start) ** 2).mean().sqrt() for mean, start, sigma in parts]
        scales = closed if noise.log_prior is None else noise.log_prior.exp().flatten().unbind()
        for (mean, start, sigma), scale in zip(parts, scales, strict=True):
            expected += kl_divergence(Normal(mean, sigma), Normal(start, scale)).sum()
    torch.testing.assert_close(pac.kl(model), expected)  # default tolerances: float64 rounding


def test_trained_prior_starts_at_the_closed_one_and_is_no_part_of_the_file(tmp_path: Path) -> None:
    model = applied("llama", "qv:lora(r=4)").double()
    pac = gp.PAC(examples=20, prior="trained").attach(model)
    closed = applied("llama", "qv:lora(r=4)").double()
    assert pac.kl(model).item() == pytest.approx(gp.PAC(examples=20).attach(closed).kl(closed).item(), abs=1e-9)
    assert all(n.log_prior is not None and n.log_prior.numel() == 1 for n in noises(model))
    gp.penalty(model).backward()
    # The closed form is the minimum. float64: some hundred terms cancel, and 20 · 1000 divides them.
    assert max(n.log_prior.grad.abs().item() for n in noises(model)) < 1e-15
    with torch.no_grad():
        for weight, _ in noisy(model):
            weight.add_(0.5)
    model.zero_grad()
    gp.penalty(model).backward()
    assert all(n.log_prior.grad.item() < 0 for n in noises(model)), "a wider prior would be nearer"
    gp.save(model, tmp_path)
    assert not [key for key in load_file(tmp_path / "adapter.safetensors") if "transforms" in key]
    pac.freeze(model)
    assert not any(p.requires_grad for n in noises(model) for p in n.parameters())
    with pytest.raises(RuleError, match="prior = 'learned' is neither"):
        gp.PAC(examples=5, prior="learned")


def test_noise_of_a_step_is_the_same_again() -> None:
    model = applied("llama", "qv:lora(r=4)")
    pac = gp.PAC(examples=20, sigma=0.3).attach(model)
    example = call("llama", model)
    randomize(model)
    model.train()
    pac.step = 4
    fourth = outputs(model, example)
    assert same(outputs(model, example), fourth)
    pac.step = 5
    assert not same(outputs(model, example), fourth)
    draws = [n.draw.flatten()[:4] for n in noises(model)]
    assert len({tuple(d.tolist()) for d in draws}) == len(draws)
    pac.step = 4
    assert same(outputs(model, example), fourth)
    other = copy.deepcopy(model)
    get_state(other).adapters["default"].objective.seed = 1
    assert not same(outputs(other, example), fourth)
    pac.step = None
    assert not same(outputs(model, example), outputs(model, example))


class Loose(Factor):
    def __init__(self, n: int) -> None:
        super().__init__(n, n)
        self.gain = nn.Parameter(torch.ones(n))


def test_refusals_change_nothing() -> None:
    model = applied("llama", "q:lora; v:lora")
    next(iter(chains(model, "default").values())).factors.insert(0, Loose(64))
    with pytest.raises(
        AdapterError, match=r"Loose of adapter 'default' at .*q_proj\.weight.* trains 'factors\.0\.gain'"
    ):
        gp.PAC(examples=5).attach(model)
    assert not noises(model)
    model = applied("llama", "q:lora")
    pac = gp.PAC(examples=5).attach(model)
    with pytest.raises(AdapterError, match="already has a PAC objective"):
        pac.attach(model)
    gp.merge(model)
    with pytest.raises(AdapterError, match="Cannot attach noise while default is merged"):
        pac.attach(model)
    with pytest.raises(AdapterError, match="has no adapters"):
        gp.PAC(examples=5).attach(build("llama"))
    for wrong in (dict(examples=0), dict(examples=5, gamma=-1.0), dict(examples=5, sigma=0.0), dict(examples=5, K=0)):
        with pytest.raises(RuleError, match="is not > 0"):
            gp.PAC(**wrong)
