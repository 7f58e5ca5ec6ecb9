"""What trains and what does not, also through checkpoints: B16, B17 and B19 of PEFT's tests."""

from __future__ import annotations

import pytest
import torch
from checks import adapters, floats, randomize, same
from grid import TRANSFORMERS, Call, Cell, cells, example, fresh
from torch import Tensor, nn
from zoo import t5

import graphpeft as gp

pytestmark = pytest.mark.filterwarnings("ignore:.*checkpointing.*is deprecated:FutureWarning")


def backward(cell: Cell, model: nn.Module) -> None:
    args, kwargs = example(cell.name)
    torch.stack([t.pow(2).mean() for t in floats(model(*args, **kwargs))]).sum().backward()


def with_gradients(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.grad is not None}


@cells()
def test_b16_gradients_reach_the_adapter_and_what_else_is_told_to_train(cell: Cell) -> None:
    model = cell.adapted().train()
    trained = set(adapters(model))
    backward(cell, model)
    assert with_gradients(model) == trained
    also = next(n for n, p in model.named_parameters() if n not in trained)
    model.zero_grad(set_to_none=True)
    # PEFT says `modules_to_save`. Not `get_parameter`: in the weight form that finds the adapted weight.
    dict(model.named_parameters())[also].requires_grad_(True)
    backward(cell, model)
    assert with_gradients(model) == {also, *trained}


@cells()
def test_b17_three_steps_move_the_adapter_and_leave_the_base(cell: Cell) -> None:
    model = cell.adapted()
    for name, parameter in adapters(model).items():
        if name.endswith("logits"):
            parameter.data.fill_(4.0)  # B-LoRA's gates nearly always open: what is shut for three steps does not train
    before = cell.run(model)
    start = {n: p.detach().clone() for n, p in model.train().named_parameters()}
    # All parameters, as many scripts do: those that get no gradient stay.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        backward(cell, model)
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert moved <= set(adapters(model))
    # A gate that was drawn wholly open has no gradient of the loss, nor then a range, for nothing is rounded.
    assert moved >= {name for name in adapters(model) if not name.endswith(("logits", "log_range"))}
    model.eval()
    assert not same(cell.run(model), before)
    with gp.disabled(model):
        assert same(cell.run(model), cell.run(cell.base()))  # to the bit; PEFT allows 1e-4


METHODS = "q:lora; k:vera(r=8); v:rlora; o:olora(r=4); up:dora(r=4); down:blora(r=4)"


def without_dropout(name: str) -> nn.Module:
    """A model whose forward pass can be compared with its recomputation, in training mode and float64."""
    model = t5(dropout_rate=0.0).double() if name == "t5" else fresh(name, torch.float64)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def gradients(model: nn.Module, example: Call) -> dict[str, Tensor]:
    """Of an adapter's tensors. B-LoRA's gates are drawn, and drawn again in the recomputation."""
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    model(**example[1]).logits.pow(2).sum().backward()
    found = {n: p.grad for n, p in adapters(model).items() if p.grad is not None}
    assert set(found) == set(adapters(model))
    return found


def agree(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, grad in one.items():
        assert other[name].any() or name.endswith("logits"), name
        # float64; gradients are summed over the uses of an activation in another order.
        assert (grad - other[name]).abs().max() <= 1e-10 * other[name].abs().max(), name


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_b19_checkpointing_keeps_the_gradients(name: str) -> None:
    """Reentrant checkpoints pass gradients on only to inputs that ask for some, and the embedding is frozen:
    transformers asks for it by itself, whether checkpointing is switched on before or after `apply`."""
    model = without_dropout(name)
    gp.apply(model, METHODS)
    randomize(model)
    expected = gradients(model, example(name, torch.float64))
    for options in (None, {"use_reentrant": True}, {"use_reentrant": False}):
        model.gradient_checkpointing_enable(options)
        assert model.is_gradient_checkpointing
        found = gradients(model, example(name, torch.float64))
        agree(found, expected)
        model.gradient_checkpointing_disable()


def test_b19_checkpointing_before_apply() -> None:
    model = without_dropout("llama")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    gp.apply(model, "qv:lora")
    randomize(model)
    found = gradients(model, example("llama", torch.float64))
    model.gradient_checkpointing_disable()
    agree(found, gradients(model, example("llama", torch.float64)))


def test_b19_reentrant_checkpoints_of_a_vision_model_fail_aloud() -> None:
    """transformers asks for no gradient of an image: torch then refuses to run backward, rather than training nothing."""
    model = without_dropout("vit")
    gp.apply(model, "qv:lora")
    image = example("vit", torch.float64)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with (
        pytest.raises(RuntimeError, match="does not require grad"),
        pytest.warns(UserWarning, match="None of the inputs"),
    ):
        gradients(model, image)
    model.enable_input_require_grads()  # the remedy
    gradients(model, image)
    model.gradient_checkpointing_disable()
    model.gradient_checkpointing_enable()
    gradients(model, image)
