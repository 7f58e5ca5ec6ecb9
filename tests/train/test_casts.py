"""Adapters in float32 on bases in bfloat16, autocast and gradient checkpointing: casts only where dtypes differ."""

from __future__ import annotations

import contextlib
from typing import Any

import peft
import pytest
import torch
from checks import adapters, build, randomize
from steps import batches, same_start, train
from torch import Tensor, nn

import graphpeft as gp

pytestmark = pytest.mark.filterwarnings("ignore:.*checkpointing.*is deprecated:FutureWarning")
BF16 = torch.bfloat16


def casts(model: nn.Module) -> int:
    """Casts in the rewritten code of the first layer's queries."""
    return str(model.get_submodule("model.layers.0.self_attn.q_proj").code).count(".to(")


@pytest.mark.parametrize("method", ["lora(r=4)", "dora(r=4)", "rlora(r=16)", "vera(r=16)"])
def test_casts_stand_only_where_dtypes_differ(method: str) -> None:
    model = gp.apply(build("llama", dtype=BF16), f"q:{method}")
    assert {p.dtype for p in adapters(model).values()} == {torch.float32}
    reads = 4 if method.startswith("dora") else 2  # y and x; and of DoRA the product without a bias, and the gain
    assert casts(model) == reads + 1
    model.float()
    assert casts(model) == 0
    assert casts(gp.apply(build("llama"), f"q:{method}")) == 0
    model.to(BF16)  # the way to have adapters in the base's dtype
    assert {p.dtype for p in adapters(model).values()} == {BF16}
    assert casts(model) == (1 if method.startswith("dora") else 0)  # its gain is float32 all the same


def test_losses_on_a_bfloat16_base_are_those_of_peft() -> None:
    """PEFT keeps the adapter in float32 as well (`autocast_adapter_dtype`)."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    ours, theirs = build("llama", dtype=BF16), peft.get_peft_model(build("llama", dtype=BF16), config)
    gp.apply(ours, "qv:lora(r=4, alpha=8)")
    same_start(ours, theirs, lambda path: f"base_model.model.{path}")
    data = batches("llama", 10)
    mine, reference = train(ours, data, lr=3e-2), train(theirs, data, lr=3e-2)
    assert abs(mine[0] - mine[-1]) > 1e-2
    # Activations have 8 bits: the branch is rounded into them in another order, and AdamW amplifies what differs.
    assert mine == pytest.approx(reference, abs=1e-2)
    assert {p.dtype for p in adapters(ours).values()} == {torch.float32}
    assert {p.grad.dtype for p in adapters(ours).values() if p.grad is not None} == {torch.float32}
    assert {p.dtype for n, p in ours.named_parameters() if "adapters" not in n} == {BF16}


def gradients(model: Any, autocast: bool) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    context = torch.autocast("cpu", BF16) if autocast else contextlib.nullcontext()
    with context:
        loss = model(**batches("llama", 1)[0]).loss
    loss.backward()
    return [p.grad for p in adapters(model).values() if p.grad is not None]


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, True), (BF16, False), (BF16, True)])
def test_checkpoints_and_autocast_keep_the_gradients(dtype: torch.dtype, autocast: bool) -> None:
    exact = gp.apply(build("llama"), "qv:lora; up:rlora; down:dora")
    randomize(exact, std=0.1)
    expected = gradients(exact.train(), False)
    model = gp.apply(build("llama", dtype=dtype), "qv:lora; up:rlora; down:dora")
    randomize(model, std=0.1)
    found = gradients(model.train(), autocast)
    assert len(found) == len(expected) == len(adapters(model))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        # Products of some twenty operators that keep 8 bits each, relative to the largest entry.
        assert (one - other).abs().max() < 0.1 * other.abs().max()
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        again = gradients(model, autocast)
        model.gradient_checkpointing_disable()
        for one, other in zip(again, found, strict=True):
            # The same kernels once more; what is summed over uses is summed in another order, in 8 bits.
            assert (one - other).abs().max() < 2e-2 * other.abs().max()
