"""Strengths of adapters that act together, and other names: against sums of updates, and PEFT where it has the same."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from zoo import gpt2, llama, mixtral, t5

import graphpeft as gp
from graphpeft.capturing.capture import example_call, inference_view
from graphpeft.capturing.outputs import difference, floats
from graphpeft.errors import AdapterError
from graphpeft.rewrite.state import chains


def two(make: object, rules: tuple[str, str]) -> nn.Module:
    """A copy, for the captures take most of the time."""
    return copy.deepcopy(_two(make, rules))


@cache
def _two(make: object, rules: tuple[str, str]) -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()  # type: ignore[operator]
    for name, rule in zip("ab", rules, strict=True):
        gp.apply(model, rule, name=name)
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            nn.init.normal_(parameter, std=0.1)
    return model


def outputs(model: nn.Module) -> list[torch.Tensor]:
    args, kwargs = example_call(model, None)
    with inference_view(model):
        return floats(model(*args, **kwargs))


@pytest.mark.parametrize(
    ("make", "rules"),
    [
        (llama, ("qv:lora", "linear:rlora(r=8)")),
        (gpt2, ("v:lora; mlp:melora(n=2)", "qv:vera(r=8)")),
        (t5, ("embed:lora; k:lora", "q[cross]:olora(r=2)")),
        pytest.param(mixtral, ("experts:lora(r=2)", "attn:blora"), marks=pytest.mark.slow),
    ],
)
def test_strengths_multiply_updates(make: object, rules: tuple[str, str]) -> None:
    """The same as a base whose weights are changed by the weighted sum of both updates."""
    model = two(make, rules)
    gp.activate(model, {"a": 0.5, "b": -2.0})
    want = outputs(model)
    gp.merge(model)
    assert difference(outputs(model), want) < 2e-5 * float(want[0].abs().max())
    gp.unmerge(model)
    gp.activate(model, ["a", "b"])
    alone = outputs(model)
    assert difference(alone, want) > 1e-3 * float(want[0].abs().max())
    gp.activate(model, {"a": 0.0, "b": 0.0})
    still = outputs(model)
    with gp.disabled(model):
        assert difference(outputs(model), still) < 1e-6 * float(still[0].abs().max())
    gp.activate(model, {"a": 1, "b": 1})
    assert difference(outputs(model), alone) == 0


def test_a_strength_survives_copies_and_other_activations_and_is_not_saved(tmp_path: Path) -> None:
    model = two(llama, ("qv:lora", "mlp:lora"))
    gp.activate(model, {"a": 0.25})
    quarter = outputs(model)
    assert difference(outputs(copy.deepcopy(model)), quarter) == 0
    with gp.disabled(model):
        pass
    assert difference(outputs(model), quarter) == 0
    gp.save(model, tmp_path, "a")
    gp.activate(model, "a")
    whole = outputs(model)
    assert difference(whole, quarter) > 1e-3
    gp.remove(model)
    assert difference(outputs(gp.load(model, tmp_path)), whole) == 0
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(AdapterError, match="it has to be a finite number"):
            gp.activate(model, {"a": wrong})
    assert difference(outputs(model), whole) == 0


def test_dora_takes_a_strength_as_peft_does() -> None:
    import peft

    model = two(llama, ("q:dora", "v:lora"))
    base = copy.deepcopy(model)
    gp.remove(base)
    other = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=8, use_dora=True, target_modules=["q_proj"]), "a")
    for site, chain in chains(model, "a").items():
        layer = other.get_submodule(f"base_model.model.{site.owner}")
        layer.lora_B["a"].weight.data.copy_(chain.factors[0].weight)
        layer.lora_A["a"].weight.data.copy_(chain.factors[1].weight)
        layer.lora_magnitude_vector["a"].weight.data.copy_(chain.reweight.magnitude.value)
        layer.set_scale("a", 0.5)
    gp.activate(model, {"a": 0.5})
    tokens = torch.randint(3, 100, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, other.eval()(tokens).logits, atol=1e-5, rtol=1e-5)


def test_another_name_keeps_tensors_outputs_and_training(tmp_path: Path) -> None:
    model = two(t5, ("embed:lora; q:lora", "v:lora"))
    gp.activate(model, {"a": 0.5, "b": 1.0})
    want, tensors = outputs(model), [p for p in model.parameters() if p.requires_grad]
    gp.rename(model, "a", "task")
    assert difference(outputs(model), want) == 0
    assert {id(p) for p in tensors} == {id(p) for p in model.parameters() if p.requires_grad}
    assert any(".adapters.task." in name for name, _ in model.named_parameters())
    assert not any(".adapters.a." in name for name, _ in model.named_parameters())
    assert str(gp.explain(model)).startswith("task (active at strength 0.5)")
    gp.verify(model, level="fast")
    gp.save(model, tmp_path, "task")
    gp.remove(model, "task")
    gp.load(model, tmp_path)
    for old, new, text in (
        ("none", "c", "no adapter 'none'"),
        ("task", "b", "already has an adapter 'b'"),
        ("b", "x.y", "cannot name"),
    ):
        with pytest.raises(AdapterError, match=text):
            gp.rename(model, old, new)
    gp.merge(model)
    with pytest.raises(AdapterError, match="is merged"):
        gp.rename(model, "task", "c")
