"""Other numbers in the tensors of an adapter: the outputs are those of the adapter that came, the code stays."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from checks import Snapshot, adapters, applied, build, call, delta, outputs, randomize, same
from torch import nn
from torch._dynamo.testing import CompileCounter

import graphpeft as gp
from graphpeft.errors import AdapterError, FileError
from graphpeft.rewrite.state import get_state

TOLERANCE = 1e-5
"""float32, logits of size 1: a scale is in B, and zeros fill up the rank, which may sum products in another order."""


def stored(folder: Path, rules: str, format: str = "graphpeft", seed: int = 5) -> list[torch.Tensor]:
    """A trained adapter in a folder, and what the model gives with it."""
    model = applied("llama", rules, seed=seed)
    randomize(model, seed=seed)
    gp.save(model, folder, format=format)
    return outputs(model, call("llama", model))


def slot(rules: str = "linear:lora(r=8, alpha=16)") -> nn.Module:
    model = applied("llama", rules)
    randomize(model)
    return model


@pytest.mark.parametrize(
    "rules",
    [
        "linear:lora(r=8, alpha=16)",
        "qv:lora(r=3, alpha=1)",  # lower rank, other scale, fewer sites
        "attn:vera(r=8)",
        "mlp:melora(n=2, r=2); q:rlora(r=8)",
    ],
)
def test_into_plain_lora(rules: str, tmp_path: Path) -> None:
    expected, model = stored(tmp_path, rules), slot()
    example, before = call("llama", model), Snapshot.of(model)
    assert delta(outputs(model, example), expected) > 0.01
    gp.swap(model, tmp_path)
    assert delta(outputs(model, example), expected) < TOLERANCE
    now = Snapshot.of(model)
    assert (now.identities, now.modules, now.required) == (before.identities, before.modules, before.required)
    gp.save(model, tmp_path / "again")  # a file of the slot is one of what came
    other = build("llama")
    gp.load(other, tmp_path / "again")
    assert same(outputs(other, example), outputs(model, example))


@pytest.mark.parametrize("method", ["vera(r=8)", "dora(r=2)", "rlora", "olora(r=2)", "melora(n=2, r=2)"])
def test_into_its_own_kind(method: str, tmp_path: Path) -> None:
    """To the bit, tensors that come from the seed included."""
    expected, model = stored(tmp_path, f"qv:{method}"), slot(f"qv:{method}")
    gp.swap(model, tmp_path)
    example = call("llama", model)
    assert same(outputs(model, example), expected)
    gp.save(model, tmp_path / "again")
    other = build("llama")
    gp.load(other, tmp_path / "again")
    assert same(outputs(other, example), expected)


def test_from_peft(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(
        build("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    theirs.save_pretrained(tmp_path)
    model = slot()
    example = call("llama", model)
    gp.swap(model, tmp_path)
    assert delta(outputs(model, example), outputs(theirs, example)) < TOLERANCE


def test_a_compiled_model_is_not_compiled_again(tmp_path: Path) -> None:
    first, second = stored(tmp_path / "1", "qv:lora(r=4)"), stored(tmp_path / "2", "mlp:lora(r=2, alpha=8)", seed=6)
    model, counter = slot(), CompileCounter()
    example = call("llama", model)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    outputs(compiled, example)
    for folder, expected in ((tmp_path / "1", first), (tmp_path / "2", second), (tmp_path / "1", first)):
        gp.swap(model, folder)
        assert delta(outputs(compiled, example), expected) < TOLERANCE
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("held", "comes", "said"),
    [
        ("qv:lora(r=4)", "qv:lora(r=5)", r"has rank 4, and the folder's update has 5"),
        ("q:lora(r=4)", "qv:lora(r=4)", r"v.*, where adapter 'default' has no site"),
        ("q:vera(r=8)", "q:lora(r=4)", r"accepts only its own method"),
        ("q:lora(r=8)", "q:dora(r=4)", r"no LoRA pair"),
    ],
)
def test_what_does_not_fit(held: str, comes: str, said: str, tmp_path: Path) -> None:
    stored(tmp_path, comes)
    model = slot(held)
    before = Snapshot.of(model)
    with pytest.raises(AdapterError, match=said):
        gp.swap(model, tmp_path)
    before.check(model)
    assert list(get_state(model).adapters) == ["default"]


def test_another_base_and_no_such_adapter(tmp_path: Path) -> None:
    stored(tmp_path, "q:lora(r=2)")
    model = slot("q:lora(r=2)")
    with pytest.raises(AdapterError, match="no adapter 'gone'"):
        gp.swap(model, tmp_path, "gone")
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    kept = {name: p.clone() for name, p in adapters(model).items()}
    with pytest.raises(FileError, match="trained on other base weights"):
        gp.swap(model, tmp_path)
    assert all(torch.equal(p, kept[name]) for name, p in adapters(model).items())
