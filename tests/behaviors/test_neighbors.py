"""Several adapters on one model, and what fails beside them: B22 to B25 and B27 of PEFT's tests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from checks import Snapshot, adapters, randomize, same
from grid import MLP, TARGETS, apply, close, fresh, given, models, run
from peft import LoraConfig
from torch import Tensor, nn

import graphpeft as gp
from graphpeft.errors import AdapterError, FileError, GraphPeftError, MatchError


def two(name: str) -> nn.Module:
    """Adapters on the same sites; the second is active."""
    model = fresh(name)
    for adapter, method in (("one", "lora(r=4)"), ("two", "melora(n=2, r=2)")):
        apply(name, model, f"{TARGETS[name][0]}:{method}", name=adapter)
    return model


def updates(model: nn.Module, adapter: str) -> list[Tensor]:
    """What an adapter makes of the weights, read off a merged model."""
    model = copy.deepcopy(model)
    base = [p.detach().clone() for n, p in model.named_parameters() if ".adapters." not in n]
    gp.merge(model, adapter)
    return [p - before for p, before in zip(model.parameters(), base, strict=True)]


@models()
def test_b22_a_weighted_adapter_is_the_weighted_sum(name: str) -> None:
    """By `combine`, PEFT's `add_weighted_adapter`, and by strengths of what stays apart. PEFT allows 1e-4."""
    model = two(name)
    one, other = updates(model, "one"), updates(model, "two")
    gp.combine(model, {"one": 0.7, "two": -0.4}, "sum")
    wanted = [0.7 * a - 0.4 * b for a, b in zip(one, other, strict=True)]
    assert max(float(w.abs().max()) for w in wanted) > 1e-2
    assert close(updates(model, "sum"), wanted, 1e-5)  # float32, read off by a difference
    combined = run(name, model)
    gp.activate(model, {"one": 0.7, "two": -0.4})
    assert close(run(name, model), combined, 1e-5)
    assert not close(combined, run(name, fresh(name)), 1e-3)


@models()
def test_b22_a_negative_weight_negates(name: str) -> None:
    """PEFT allows 1e-6."""
    model = two(name)
    gp.combine(model, {"one": -1.0}, "minus")
    plus, minus = updates(model, "one"), updates(model, "minus")
    assert max(float(t.abs().max()) for t in plus) > 1e-2
    assert close(minus, [-t for t in plus], 1e-6)
    gp.activate(model, ["one", "minus"])
    assert close(run(name, model), run(name, fresh(name)), 1e-5)


@models()
def test_b22_a_strength_is_no_part_of_what_is_lowered_or_saved(name: str, tmp_path: Path) -> None:
    model = two(name)
    whole = run(name, model)
    gp.activate(model, {"two": 0.5})
    half = run(name, model)
    if name != "mha":  # of which PEFT adapts all or nothing
        gp.save(model, tmp_path, "two", format="peft")
        assert close(run(name, gp.load(fresh(name), tmp_path)), whole, 1e-5)
    gp.lower(model, "two")
    assert close(run(name, model), half, 1e-5)
    gp.activate(model, "two")
    assert close(run(name, model), whole, 1e-5)
    assert not close(half, whole, 1e-3)


@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
@models()
def test_b23_removing_active_and_resting_adapters(name: str, merged: bool) -> None:
    model = two(name)
    apply(name, model, f"{TARGETS[name][1]}:lora", name="three")
    gp.activate(model, "one")
    alone, base = run(name, model), run(name, fresh(name))
    gp.activate(model, ["one", "two"])
    if merged:
        gp.merge(model)
    gp.remove(model, "two")  # active; what is merged is taken out first
    assert same(run(name, model), alone)
    assert not adapters(model, "two")
    gp.remove(model, "three")  # resting
    assert same(run(name, model), alone)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(adapters(model, "one"))
    held = Snapshot.of(model)
    with pytest.raises(AdapterError, match="There is no adapter 'two'"):
        gp.remove(model, "two")
    held.check(model)
    apply(name, model, f"{TARGETS[name][0]}:lora", name="two")  # the name is free again
    gp.remove(model, "two")
    assert same(run(name, model), base)  # PEFT: no adapter is active then
    gp.remove(model, "one")
    assert list(model.state_dict()) == list(fresh(name).state_dict())
    assert same(run(name, model), base)


def unknown_target(name: str, model: nn.Module, folder: Path) -> None:
    apply(name, model, "path(nothing.*):lora", name="new")


def refused_at_the_second_site(name: str, model: nn.Module, folder: Path) -> None:
    first, second = TARGETS[name]
    apply(name, model, f"{first}:lora; {second}:olora(r=1000)", name="new")


def taken_name(name: str, model: nn.Module, folder: Path) -> None:
    apply(name, model, f"{TARGETS[name][1]}:lora", name="one")


def file_of_another_model(name: str, model: nn.Module, folder: Path) -> None:
    other = "mlp" if name == "conv2d" else "conv2d"
    gp.save(apply(other, fresh(other), f"{TARGETS[other][0]}:lora"), folder)
    gp.load(model, folder, name="new")


Action = Callable[[str, nn.Module, Path], None]
FAILING: dict[Action, type[GraphPeftError]] = {
    unknown_target: MatchError,
    refused_at_the_second_site: AdapterError,
    taken_name: AdapterError,
    file_of_another_model: FileError,
}


@pytest.mark.parametrize(("action", "error"), FAILING.items(), ids=[action.__name__ for action in FAILING])
@models()
def test_b24_a_failing_second_adapter_leaves_the_model(
    name: str, action: Action, error: type[GraphPeftError], tmp_path: Path
) -> None:
    model = two(name)
    gp.activate(model, ["one", "two"])
    before, adapted = Snapshot.of(model), run(name, model)
    with pytest.raises(error):
        action(name, model, tmp_path)
    before.check(model, adapted=True)
    assert same(run(name, model), adapted)
    gp.remove(model)
    assert same(run(name, model), run(name, fresh(name)))


@models()
def test_b25_training_follows_activation(name: str) -> None:
    """Adapters on the same sites, on others, and on some of both. PEFT lets only one be active by `set_adapter`."""
    model = two(name)
    first, second = TARGETS[name]
    apply(name, model, f"{second}:lora", name="three")
    apply(name, model, f"{first}:lora; {second}:lora", name="four")
    for chosen in ("one", "three", ["one", "three"], ["four", "two"], None, "four"):
        gp.activate(model, chosen)
        active = [chosen] if isinstance(chosen, str) else chosen or []
        wanted = {n for each in active for n in adapters(model, each)}
        assert {n for n, p in model.named_parameters() if p.requires_grad} == wanted
        outputs = run(name, model)
        # What rests is not read: its numbers may be anything.
        for each in {"one", "two", "three", "four"} - set(active):
            randomize(model, each, seed=5)
        assert same(run(name, model), outputs)
        assert close(outputs, run(name, fresh(name)), 1e-3) == (not active)


# -- a weight as a parameter -----------------------------------------------------------------------------------------


class Read(nn.Linear):
    """Its code branches on a shape, so that torch.fx cannot trace it: the weight itself is adapted instead."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[0] > 1 else super().forward(x[:1])


class ReadMLP(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = Read(12, 20)


@pytest.mark.parametrize("method", ["lora(r=4, alpha=8)", "dora(r=4)", "olora(r=4)", "vera(r=8)", "rlora(r=8)"])
def test_b27_a_weight_as_a_parameter_is_adapted_as_its_layer_is(method: str) -> None:
    """The weight form and the side path: the same outputs and, within float32, the same three steps of training."""
    layer, weight = fresh("mlp"), ReadMLP().eval()
    weight.load_state_dict(layer.state_dict())
    forms = [[site.form for site in gp.sites(m, given("mlp"))] for m in (layer, weight)]
    assert forms == [["branch", "branch"], ["weight", "branch"]]
    base = run("mlp", layer)
    for model in (layer, weight):
        apply("mlp", model, f"path(lin0):{method}")
    assert list(adapters(layer)) == list(adapters(weight))
    for model in (layer, weight):
        model.train()
        optimizer = torch.optim.SGD(adapters(model).values(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(*given("mlp")).square().sum().backward()
            optimizer.step()
    assert close(run("mlp", layer), run("mlp", weight), 1e-5)
    assert close(adapters(layer).values(), adapters(weight).values(), 1e-5)
    assert not close(run("mlp", layer), base, 1e-2)


def test_b27_as_target_parameters_of_peft() -> None:
    """Which there equal `target_modules`; its A is drawn as a parameter's."""
    model = apply("mlp", fresh("mlp"), "path(lin0.weight):lora(r=4, alpha=8)")
    b, a = adapters(model).values()
    for config in ({"target_parameters": ["lin0.weight"]}, {"target_modules": ["lin0"]}):
        options: Any = {"target_modules": [], **config}
        theirs = peft.get_peft_model(fresh("mlp"), LoraConfig(r=4, lora_alpha=8, **options)).eval()
        tensors = dict(theirs.named_parameters())
        for letter, tensor in (("A", a), ("B", b)):
            (path,) = (n for n in tensors if f"lora_{letter}" in n)
            tensors[path].data.copy_(tensor)
        assert close(run("mlp", model), run("mlp", theirs), 1e-5)


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_b27_a_path_is_the_role_that_it_leads_to(name: str) -> None:
    """The same tensors, from the same seed: what a rule is called is no part of it."""
    by_role, by_path = fresh(name), fresh(name)
    gp.apply(by_role, "o+down:lora(r=4)", seed=3)
    names = {"llama": ("*.o_proj", "*.down_proj"), "gpt2": ("*.c_proj",)}[name]
    gp.apply(by_path, "; ".join(f"path({glob}):lora(r=4)" for glob in names), seed=3)
    assert list(adapters(by_role)) == list(adapters(by_path))
    assert same(adapters(by_role).values(), adapters(by_path).values())
