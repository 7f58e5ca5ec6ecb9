"""What goes wrong says where, why and what to do about it, and leaves the model as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import transformers
from checks import Snapshot, adapters, applied, build, call, delta, outputs, randomize, same
from torch import nn

import graphpeft as gp
from graphpeft.chain import Chain, Dense, normal
from graphpeft.errors import AdapterError, CaptureError, GraphPeftError, MatchError, RuleError, VerifyError
from graphpeft.methods import Method
from graphpeft.methods import base as methods


def mamba() -> nn.Module:
    config = transformers.MambaConfig(
        vocab_size=128, hidden_size=32, state_size=4, num_hidden_layers=2, expand=2, time_step_rank=4
    )
    return transformers.MambaForCausalLM(config).eval()


class Branching(nn.Module):
    """Its path depends on the values of its input, which no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if x.sum() > 0 else x


X = torch.randn(2, 7, 32)
BAD: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[GraphPeftError], str]] = {
    "role typo": (lambda: build("llama"), {"rules": "qw:lora"}, RuleError, r"Unknown target qw.*\^\^.*runs of q k v o"),
    "unknown method": (
        lambda: build("llama"),
        {"rules": "qv:lroa"},
        RuleError,
        r"Unknown method lroa.*\^{4}.*mean lora",
    ),
    "unknown option": (
        lambda: build("llama"),
        {"rules": "qv:lora(rank=4)"},
        RuleError,
        r"option of lora rank.*\^{4}.*r \(",
    ),
    "bad value": (lambda: build("llama"), {"rules": "qv:lora(r=0)"}, RuleError, r"r = 0 is not int >= 1.*\^"),
    "no rules": (lambda: build("llama"), {"rules": " "}, RuleError, r"empty.*qv:lora"),
    "no such layer": (
        lambda: build("llama"),
        {"rules": "qv[layers=5-7]:lora"},
        MatchError,
        r"`qv\[layers=5-7\]:lora` matches no site of LlamaForCausalLM.*q × 2.*layer 0 outside 5-7.*Widen",
    ),
    "no cross attention": (
        lambda: build("llama"),
        {"rules": "q[cross]:lora"},
        MatchError,
        r"not cross-attention.*Widen",
    ),
    "no gate": (
        lambda: build("bert"),
        {"rules": "gate:lora"},
        MatchError,
        r"`gate:lora` matches no site.*its mlp has up and down but no gate.*up × 2",
    ),
    "one rule of two": (
        lambda: build("bert"),
        {"rules": "q:lora; gate:lora"},
        MatchError,
        r"`gate:lora` matches no site",
    ),
    "no such path": (
        lambda: build("llama"),
        {"rules": "path(*.query):lora"},
        MatchError,
        r"`path\(\*\.query\):lora` matches no projection.*_proj\.weight.*Adjust the glob",
    ),
    "no attention": (mamba, {"rules": "qv:lora"}, MatchError, r"no attention core was found.*path\(\*\.\w+\):lora"),
    "two rules, one site": (
        lambda: build("llama"),
        {"rules": "qv:lora; path(*.q_proj):rlora"},
        RuleError,
        r"layers\.0\.self_attn\.q_proj\.weight \(q\) is selected by two rules: `qv:lora` and `path.*Narrow",
    ),
    "expected otherwise": (
        lambda: build("llama"),
        {"rules": "qv:lora", "expect": 8},
        MatchError,
        r"`qv:lora` selects 4 sites of LlamaForCausalLM, expected 8.*gp\.plan",
    ),
    "name with a dot": (
        lambda: build("llama"),
        {"rules": "q:lora", "name": "a.b"},
        AdapterError,
        r"'a\.b' cannot name",
    ),
    "name of a method": (
        lambda: build("llama"),
        {"rules": "q:lora", "name": "keys"},
        AdapterError,
        r"'keys' cannot name",
    ),
    "no name": (lambda: build("llama"), {"rules": "q:lora", "name": ""}, AdapterError, r"'' cannot name.*letters"),
    "no inputs": (
        lambda: build("hand_written"),
        {"rules": "q:lora"},
        CaptureError,
        r"HandWritten cannot be captured without inputs.*inputs=\(x,\)",
    ),
    "inputs of another width": (
        lambda: build("hand_written"),
        {"rules": "q:lora", "inputs": (X[..., :5],)},
        CaptureError,
        r"HandWritten cannot be captured: the inputs do not fit.* in HandWritten, zoo\.py:\d+ .*Check that model",
    ),
    "inputs of another name": (
        lambda: build("llama"),
        {"rules": "q:lora", "inputs": {"pixels": X}},
        CaptureError,
        r"LlamaForCausalLM cannot be captured: .*Check that model\(\*\*inputs\) runs",
    ),
    "branches on values": (
        Branching,
        {"rules": "path(layer):lora", "inputs": (X[..., :4],)},
        CaptureError,
        r"Branching cannot be captured: .*branches on the values of a tensor.* in Branching, test_errors\.py:\d+ return",
    ),
    "dropout in a fused operator": (
        lambda: build("torch_encoder"),
        {"rules": "qv:lora(dropout=0.1)", "inputs": (X,)},
        AdapterError,
        r"in_proj_weight takes the weight form.*dropout=0 for `qv:lora\(dropout=0\.1\)`",
    ),
}


@pytest.mark.parametrize(("make", "arguments", "error", "pattern"), BAD.values(), ids=BAD.keys())
def test_apply_refuses(
    make: Callable[[], nn.Module], arguments: dict[str, Any], error: type[GraphPeftError], pattern: str
) -> None:
    model = make()
    before = Snapshot.of(model)
    with pytest.raises(error) as caught:
        gp.apply(model, **arguments)
    text = " ".join(str(caught.value).split())
    assert re.search(pattern, text), text
    before.check(model)
    if "rules" in arguments and error is not AdapterError:
        arguments = {k: v for k, v in arguments.items() if k != "name"}
        with pytest.raises(error):  # plan finds the same before anything is touched
            gp.plan(model, **arguments)
        before.check(model)


def test_a_path_adapts_what_has_no_role() -> None:
    model = mamba()
    example = call("llama", model)
    base, before = outputs(model, example), Snapshot.of(model)
    gp.apply(model, "path(*.in_proj):lora", expect=2)
    # The projections themselves are equal to the bit; what the scan after them rounds depends on where its buffers lie.
    assert delta(outputs(model, example), base) < 1e-6
    randomize(model)
    assert delta(outputs(model, example), base) > 1e-5
    gp.remove(model)
    before.check(model)


ADAPTED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "apply twice": (
        lambda m: gp.apply(m, "o:lora"),
        r"already has an adapter 'default', made by `qv:lora`.*name=.*gp\.remove",
    ),
    "unmerge": (gp.unmerge, r"Nothing is merged into LlamaForCausalLM.*gp\.merge"),
    "activate": (lambda m: gp.activate(m, "other"), r"no adapter 'other' on LlamaForCausalLM; there are: default"),
    "activate one of two": (lambda m: gp.activate(m, ["default", "x"]), r"no adapter 'x'"),
    "merge": (lambda m: gp.merge(m, "other"), r"no adapter 'other'"),
    "remove": (lambda m: gp.remove(m, "other"), r"no adapter 'other'"),
    "submodule": (
        lambda m: gp.remove(m.model),
        r"LlamaModel has no adapters\. Its submodule .*pass the model that gp\.apply",
    ),
    "owner": (lambda m: gp.merge(m.model.layers[0].self_attn.q_proj), r"has no adapters"),
}


@pytest.mark.parametrize(("action", "pattern"), ADAPTED.values(), ids=ADAPTED.keys())
def test_an_adapted_model_refuses(action: Callable[[nn.Module], Any], pattern: str) -> None:
    model = applied("llama", "qv:lora")
    randomize(model)
    example = call("llama", model)
    before, adapted = Snapshot.of(model), outputs(model, example)
    with pytest.raises(AdapterError, match=pattern):
        action(model)
    before.check(model)
    assert same(outputs(model, example), adapted)


@pytest.mark.parametrize(
    "action",
    [gp.merge, lambda m: gp.apply(m, "o:lora", name="x"), lambda m: gp.activate(m, None), lambda m: gp.disabled(m).__enter__()],
    ids=["merge", "apply", "activate", "disabled"],
)  # fmt: skip
def test_a_merged_model_refuses(action: Callable[[nn.Module], Any]) -> None:
    model = applied("llama", "qv:lora")
    randomize(model)
    gp.merge(model)
    before = Snapshot.of(model)
    with pytest.raises(AdapterError, match=r"while default is merged.*gp\.unmerge\(model\) first"):
        action(model)
    before.check(model)
    gp.unmerge(model)


@pytest.mark.parametrize(
    "action",
    [gp.merge, gp.unmerge, gp.remove, lambda m: gp.activate(m, "x"), lambda m: gp.disabled(m).__enter__(), gp.verify],
    ids=["merge", "unmerge", "remove", "activate", "disabled", "verify"],
)
def test_a_model_without_adapters_refuses(action: Callable[[nn.Module], Any]) -> None:
    model = build("llama")
    before = Snapshot.of(model)
    with pytest.raises(AdapterError, match=r"LlamaForCausalLM has no adapters\. Call gp\.apply"):
        action(model)
    before.check(model)


def test_nothing_active_is_nothing_to_merge() -> None:
    model = applied("llama", "qv:lora")
    gp.activate(model, None)
    with pytest.raises(AdapterError, match=r"No adapter is active.*gp\.merge\(model, 'default'\)"):
        gp.merge(model)


def test_a_failing_second_adapter_leaves_the_first() -> None:
    model = applied("llama", "qv:lora")
    randomize(model)
    model.model.layers[1].self_attn.o_proj.adapters = "mine"
    before = Snapshot.of(model)
    with pytest.raises(AdapterError, match="already has an attribute"):
        gp.apply(model, "o:lora", name="second")
    before.check(model)
    assert len(adapters(model)) == 8


def test_a_failing_initialization_leaves_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphpeft.chain import Dense

    model = applied("llama", "qv:lora")
    randomize(model)
    example = call("llama", model)
    before, adapted = Snapshot.of(model), outputs(model, example)
    monkeypatch.setattr(Dense, "reset", lambda self, rng: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gp.apply(model, "qo:lora", name="second")
    before.check(model)
    assert same(outputs(model, example), adapted)


def test_a_failed_check_gives_the_active_adapters_back() -> None:
    """The check comes last, when the new adapter already runs alone: what ran before has to run again, with its strength."""

    @dataclass(frozen=True)
    class Loud(Method):
        name: ClassVar[str] = "loud"
        paper: ClassVar[str] = "none: an update that does not start at zero"

        def chain(self, site: gp.Site) -> Chain:
            return Dense(site.outputs, 2, normal(1.0)) @ Dense(2, site.inputs, normal(1.0))

    try:
        model = applied("llama", "qv:lora")
        randomize(model)
        gp.activate(model, {"default": 0.5})
        example = call("llama", model)
        before, adapted = Snapshot.of(model), outputs(model, example)
        with pytest.raises(VerifyError):
            gp.apply(model, "qo:loud", name="second", verify="full")
        before.check(model)
        assert same(outputs(model, example), adapted)
    finally:
        del methods._METHODS["loud"]


def test_all_errors_share_one_base() -> None:
    from graphpeft import errors

    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(classes) >= 7
    assert all(issubclass(c, GraphPeftError) for c in classes)
    assert all((c.__doc__ or "").strip().endswith(".") for c in classes)
