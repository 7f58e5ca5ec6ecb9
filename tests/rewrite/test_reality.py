"""The record against the modules: what other code does to an adapted model is named at the next call, not lost in silence."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import adapters, delta, outputs, randomize, same
from torch import nn
from torch.nn.utils import parametrizations
from zoo import gpt2, llama

import graphpeft as gp
from graphpeft.errors import AdapterError
from graphpeft.rewrite.reality import same as unchanged
from graphpeft.rewrite.state import get_state

CALL = ((), {"input_ids": torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(0)), "use_cache": False})


def model(rules: str = "head+qv:lora(r=2)", make: Callable[..., nn.Module] = llama, names: str = "a") -> nn.Module:
    torch.manual_seed(0)
    made = make(layers=1).eval()
    for seed, name in enumerate(names):
        gp.apply(made, rules, name=name)
        randomize(made, name, seed=seed)
    return made


def resized(made: Any) -> None:
    made.resize_token_embeddings(140, mean_resizing=False)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "resized": resized,
    "another head": lambda m: setattr(m, "lm_head", nn.Linear(64, 128, bias=False)),
    "weight norm": lambda m: parametrizations.weight_norm(m.model.layers[0].self_attn.q_proj),
    "another layer": lambda m: m.model.layers.__setitem__(0, copy.deepcopy(llama(layers=1).model.layers[0])),
    "its class": lambda m: setattr(m.lm_head, "__class__", nn.Linear),
    "no attention": lambda m: delattr(m.model.layers[0], "self_attn"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_is_named_and_the_rest_can_be_saved_and_removed(change: str, tmp_path: Path) -> None:
    made = model()
    CHANGES[change](made)
    where = r"lm_head|self_attn"
    acts: list[Callable[[], Any]] = [lambda: made(**CALL[1]), lambda: gp.merge(made), lambda: gp.activate(made, None)]
    for act in acts:
        with pytest.raises(AdapterError, match=rf"Cannot \w+ LlamaForCausalLM: \S*({where}).*gp\.save still writes"):
            act()
    if change not in ("resized", "another head", "weight norm", "no attention"):
        gp.save(made, tmp_path / "a")
    gp.remove(made)
    assert not [name for name, _ in made.named_parameters() if "adapters" in name and "parametr" not in name]
    if change != "no attention":
        made(**CALL[1])


def test_a_tied_table_that_is_resized_in_place_is_named() -> None:
    made = model("embed:lora(r=2)", gpt2)
    made.resize_token_embeddings(140, mean_resizing=False)  # type: ignore[operator]
    with pytest.raises(AdapterError, match=r"wte has another shape: transformer\.wte\.weight is now \(140, 64\)"):
        made(**CALL[1])
    gp.remove(made)
    assert made(**CALL[1]).logits.shape[-1] == 140


def test_the_check_before_each_pass_compares_and_computes_nothing() -> None:
    made = model()
    state = get_state(made)
    assert state.watched is not None
    assert len(state.watched[1]) == 3  # one comparison for each weight
    assert unchanged(state)
    made.to(torch.float64).to(torch.float32)
    made.load_state_dict(copy.deepcopy(made.state_dict()), assign=True)
    made(**CALL[1])  # other tensors of the same shapes are no change
    assert len(made._forward_pre_hooks) == 1
    gp.remove(made)
    assert not made._forward_pre_hooks


def test_weights_that_were_changed_while_merged_are_not_overwritten() -> None:
    made, other = model(), llama(layers=1)
    torch.manual_seed(5)
    for p in other.parameters():
        nn.init.normal_(p, std=0.1)
    gp.merge(made)
    merged = copy.deepcopy(made)
    made.load_state_dict(other.state_dict())
    with pytest.raises(AdapterError, match=r"was changed after the merge.*keep=False.*force=True"):
        gp.unmerge(made)
    assert same(outputs(made, CALL), outputs(other.eval(), CALL))
    merged.to(torch.float64).to(torch.float32)
    gp.unmerge(merged)  # to other tensors and back is no change
    gp.unmerge(made, force=True)
    assert same(outputs(made, CALL)[:0], [])


def test_a_merge_can_be_final() -> None:
    made = model(names="ab")
    gp.activate(made, "a")
    adapted = outputs(made, CALL)
    base = copy.deepcopy(made)
    gp.remove(base)
    assert gp.merge_and_unload(made) is made
    assert delta(outputs(made, CALL), adapted) < 1e-5  # float32
    assert [n for n, _ in made.named_parameters()] == [n for n, _ in base.named_parameters()]
    assert [type(m) for m in made.modules()] == [type(m) for m in base.modules()]
    assert all(p.requires_grad for p in made.parameters())
    assert not hasattr(made, "_graphpeft")
    gp.apply(made, "qv:lora(r=2)")


def test_a_second_adapter_joins_a_merge() -> None:
    made = model(names="ab")
    gp.activate(made, ["a", "b"])
    both = outputs(made, CALL)
    gp.activate(made, "a")
    one = outputs(made, CALL)
    gp.merge(made)
    gp.merge(made, "b")
    assert get_state(made).merged == ("a", "b")
    assert delta(outputs(made, CALL), both) < 1e-5  # float32
    with torch.no_grad():
        get_state(made).containers["lm_head"].get_submodule("b.head.factors.0").weight.fill_(float("nan"))  # type: ignore[union-attr]
    gp.unmerge(made)
    assert same(outputs(made, CALL), one)
    gp.merge(made, "a")
    with pytest.raises(AdapterError, match="'b' at lm_head"):
        gp.merge(made, "b")
    assert get_state(made).merged == ("a",)


# -- gradients ---------------------------------------------------------------------------------------------------------


def loss(made: nn.Module) -> torch.Tensor:
    return made(**CALL[1], labels=CALL[1]["input_ids"]).loss  # type: ignore[no-any-return]


def norms(made: nn.Module, name: str) -> list[float]:
    return [float(p.grad.norm()) for p in adapters(made, name).values() if p.grad is not None]


def test_a_gradient_that_reaches_an_inactive_adapter_raises() -> None:
    made = model("qv:lora(r=2)", names="ab")
    gp.activate(made, "a")
    first = loss(made)
    gp.activate(made, "b")
    with pytest.raises(AdapterError, match=r"reached adapter 'a', which is inactive now \(active: b\)"):
        (first + loss(made)).backward()
    made.zero_grad()
    gp.activate(made, "a")
    loss(made).backward()
    gp.activate(made, "b")
    loss(made).backward()
    assert all(norms(made, "a"))
    assert all(norms(made, "b"))
    clone = copy.deepcopy(made)
    gp.activate(clone, "a")
    late = loss(clone)
    gp.activate(clone, None)
    with pytest.raises(AdapterError, match="reached adapter 'a'"):
        late.backward()


@pytest.mark.parametrize("rows", [True, False])
def test_reentrant_checkpointing_notices_a_switch(rows: bool) -> None:
    made = model("qv:lora(r=2)", names="ab").train()
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})  # type: ignore[operator]
    made.enable_input_require_grads()  # type: ignore[operator]
    gp.activate(made, ["a", "b"])
    if rows:
        with gp.per_row(made, ["a", "b", "a"]):
            first = loss(made)
    else:
        first = loss(made)
        gp.activate(made, {"a": 0.5, "b": 1.0})
    with pytest.raises(AdapterError, match="Adapters were switched between the forward and the backward pass"):
        first.backward()
    made.zero_grad()
    loss(made).backward()
    assert all(norms(made, "a"))


# -- the way in -----------------------------------------------------------------------------------------------------------


def test_wrappers_are_looked_through_or_refused(tmp_path: Path) -> None:
    made = model("qv:lora(r=2)")
    compiled = torch.compile(made, backend="eager")
    groups = [[len(g["params"]), g["lr"]] for g in gp.parameter_groups(made, 1e-3, lora_plus=16)]
    assert [[len(g["params"]), g["lr"]] for g in gp.parameter_groups(compiled, 1e-3, lora_plus=16)] == groups
    assert str(gp.explain(compiled)) == str(gp.explain(made))
    gp.save(compiled, tmp_path)
    gp.activate(compiled, None)
    assert not get_state(made).active
    for act in (lambda: gp.apply(compiled, "q:lora", name="b"), lambda: gp.load(compiled, tmp_path, "b")):
        with pytest.raises(AdapterError, match=r"wraps the model.*Adapt the LlamaForCausalLM first"):
            act()
    for wrong in ("llama", None, 3):
        for function in (gp.apply, gp.merge, gp.explain, gp.parameter_groups):
            with pytest.raises(AdapterError, match=r"Cannot \w[\w ]*: expected a torch\.nn\.Module"):
                function(wrong, "qv:lora") if function is gp.apply else function(wrong, 1)  # type: ignore[operator]


def test_a_model_of_peft_is_refused() -> None:
    import peft

    made = peft.get_peft_model(llama(layers=1), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="of PEFT, whose adapters graphpeft does not see"):
        gp.apply(made, "v:lora")


# -- state dicts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mine", "theirs", "refused"),
    [
        (("qv:rlora", 0), ("qv:rlora", 1), True),
        (("qv:vera(r=4)", 0), ("qv:vera(r=4)", 1), True),
        (("qv:lora(r=2, alpha=2)", 0), ("qv:lora(r=2, alpha=32)", 0), True),
        (("qv:lora(r=2)", 0), ("qv:lora(r=2, dropout=0.1)", 1), False),
        (("qv:lora(r=2)", 0), ("qv:olora(r=2)", 0), True),
    ],
)
def test_a_state_dict_of_other_numbers_is_refused(
    mine: tuple[str, int], theirs: tuple[str, int], refused: bool
) -> None:
    one, other = (gp.apply(llama(layers=1).eval(), rules, seed=seed) for rules, seed in (mine, theirs))
    randomize(one)
    other.load_state_dict({n: p for n, p in one.state_dict().items() if "adapters" not in n}, strict=False)
    before = outputs(other, CALL)
    if refused:
        with pytest.raises(AdapterError, match=r"other numbers of adapter 'default' at .*Nothing was loaded"):
            other.load_state_dict(one.state_dict(), strict=False)
        assert same(outputs(other, CALL), before)
        return
    other.load_state_dict(one.state_dict())
    assert same(outputs(other, CALL), outputs(one, CALL))


def test_layers_that_a_rule_misses_are_named() -> None:
    made = llama(layers=3)
    parametrizations.weight_norm(made.model.layers[1].self_attn.q_proj)
    missed = r"model\.layers\.1\.self_attn\.q_proj\.weight is no site, as it is in equal layers"
    assert re.search(rf"missed `qv:lora\(r=2\)`, {missed}", str(gp.plan(made, "qv:lora(r=2)")))
    assert "missed" not in str(gp.plan(made, "v:lora(r=2)"))
    with pytest.warns(UserWarning, match=missed) as told:
        gp.apply(made, "qv:lora(r=2)")
    assert Path(next(each for each in told if "is no site" in str(each.message)).filename) == Path(__file__)
