"""Verification has to notice what is broken: here something is broken on purpose each time."""

from __future__ import annotations

import pytest
import torch
from checks import adapters, build, inputs, randomize
from torch import nn

import graphpeft as gp
from graphpeft.chain import Chain
from graphpeft.errors import VerifyError
from graphpeft.passes import merge as merging
from graphpeft.rewrite import owner
from graphpeft.rewrite.owner import restore


def adapted(rules: str = "qv:lora", name: str = "llama") -> nn.Module:
    model = gp.apply(build(name), rules)
    randomize(model)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "albert", "t5", "torch_encoder", "hand_written"])
def test_a_sound_model_passes(name: str) -> None:
    model = build(name)
    gp.apply(model, "qvo:lora", inputs=inputs(name, model), verify="full")
    randomize(model)
    report = gp.verify(model, inputs(name, model))
    assert report.ok
    assert [check for check, _, _ in report.checks] == [
        "base names", "trainable", "graphs", "effect", "merge", "unmerge", "gradients"
    ]  # fmt: skip
    assert str(report).count("ok  ") == 7
    assert [check for check, _, _ in gp.verify(model, level="fast").checks] == ["base names", "trainable", "graphs"]
    assert gp.verify(model, level="off").checks == []


def test_verification_leaves_the_model_as_it_was() -> None:
    model = adapted().train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gp.verify(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())


def test_a_lost_branch_is_noticed() -> None:
    model = adapted()
    restore(model.model.layers[1].self_attn.v_proj)
    with pytest.raises(VerifyError, match=r"FAIL graphs: no branch at .*layers\.1\.self_attn\.v_proj:v"):
        gp.verify(model, level="fast")


def test_a_lost_branch_in_weight_form_is_noticed() -> None:
    model = build("torch_encoder")
    example = inputs("torch_encoder", model)
    gp.apply(model, "qv:lora", inputs=example)
    restore(model.layers[0].self_attn)
    with pytest.raises(VerifyError, match=r"FAIL graphs: no branch at .*layers\.0\.self_attn"):
        gp.verify(model, level="fast")


def test_a_merge_with_the_wrong_sign_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    right = merging.add_delta
    monkeypatch.setattr(merging, "add_delta", lambda weight, site, delta: right(weight, site, -delta))
    with pytest.raises(VerifyError, match="FAIL merge: merged differs from adapted by"):
        gp.verify(model)


def test_a_merge_of_one_role_too_few_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("qv:lora", "gpt2")
    right = merging.add_delta
    monkeypatch.setattr(merging, "add_delta", lambda w, site, delta: w if site.role == "v" else right(w, site, delta))
    with pytest.raises(VerifyError, match="FAIL merge"):
        gp.verify(model)


def test_an_unmerge_that_rounds_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As subtracting the update would: the last bit of a weight is off."""
    model = adapted()
    from graphpeft.passes import verify as verification

    def rounding(model: nn.Module) -> None:
        merging.unmerge(model)
        weight = model.model.layers[0].self_attn.q_proj.weight
        weight.data[0, 0] = torch.nextafter(weight.data[0, 0], torch.tensor(9.0))

    monkeypatch.setattr(verification, "unmerge", rounding)
    with pytest.raises(VerifyError, match="FAIL unmerge: weights changed"):
        gp.verify(model)


def test_a_base_parameter_that_trains_is_no_secret() -> None:
    model = adapted()
    extra = nn.Parameter(torch.zeros(3))
    model.model.layers[0].register_parameter("extra", extra)
    with pytest.raises(VerifyError, match=r"FAIL trainable: unplanned: \['model\.layers\.0\.extra'\]"):
        gp.verify(model, level="fast")


def test_a_frozen_adapter_is_noticed() -> None:
    model = adapted()
    next(iter(adapters(model).values())).requires_grad_(False)
    with pytest.raises(VerifyError, match=r"FAIL trainable: .*missing: 1"):
        gp.verify(model, level="fast")


def test_a_renamed_base_parameter_is_noticed() -> None:
    model = adapted()
    del model.model.norm.weight
    with pytest.raises(VerifyError, match=r"FAIL base names: lost: \['model\.norm\.weight'\]"):
        gp.verify(model, level="fast")


def test_an_output_that_moves_at_the_start_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphpeft.methods import lora

    monkeypatch.setattr(lora, "zeros", lora.kaiming)
    model = build("llama")
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    with pytest.raises(VerifyError, match="FAIL identity: adapters move the output by"):
        gp.apply(model, "qv:lora", verify="full")
    assert list(model.state_dict()) == list(before)
    assert all(p.requires_grad for p in model.parameters())


def test_gradients_that_do_not_arrive_are_noticed() -> None:
    model = adapted()
    layer = model.model.layers[1].self_attn
    layer.register_forward_hook(lambda module, args, output: (output[0].detach(), *output[1:]))
    # What comes before the second layer still trains: its residual passes the hook by.
    with pytest.raises(VerifyError, match="FAIL gradients: reach 4 of 8"):
        gp.verify(model)


def test_an_adapter_that_is_ignored_has_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "_shared", {})  # equal layers share their code, also those of other tests
    monkeypatch.setattr(Chain, "accumulate", lambda self, y, x, **_: y * 1)
    model = gp.apply(build("llama"), "qv:lora(r=5)")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    with pytest.raises(VerifyError, match="FAIL effect"):
        gp.verify(model)
