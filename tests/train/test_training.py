"""Training an adapted model: Hugging Face's Trainer, and PEFT's losses step by step."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from checks import adapters, build, call, outputs, randomize
from steps import batches, same_start, train
from torch import Tensor

import graphpeft as gp


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Twelve copies of three sequences, which a small model can learn by heart."""

    def __init__(self) -> None:
        self.ids = torch.randint(3, 128, (3, 8), generator=torch.Generator().manual_seed(2))

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index % 3], "labels": self.ids[index % 3]}


@pytest.mark.parametrize(("name", "checkpointing"), [("llama", False), ("gpt2", True)])
def test_trainer(name: str, checkpointing: bool, tmp_path: Any) -> None:
    model = build(name)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    gp.apply(model, "attn+up+down:lora(r=8)")
    start = {n: p.detach().clone() for n, p in adapters(model).items()}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=4, learning_rate=2e-2, logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
        gradient_checkpointing=checkpointing, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.1  # in nats; batches of the same three sequences differ by less
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], base[n]) for n in base)
    assert all(not torch.equal(p, start[n]) for n, p in adapters(model).items())


@pytest.mark.parametrize(
    ("name", "rules", "targets"),
    [
        ("llama", "qv:lora(r=4, alpha=8)", ["q_proj", "v_proj"]),
        ("bert", "qv:lora(r=4, alpha=8)", ["query", "value"]),
        # PEFT cannot adapt part of c_attn, so the comparison is on what is not fused.
        ("gpt2", "o+up+down:lora(r=4, alpha=8)", ["c_proj", "c_fc"]),
        ("llama", "linear:lora(r=4, alpha=6, rslora=true)", "all-linear"),
    ],
    ids=["llama", "bert", "gpt2", "llama-rslora"],
)
def test_losses_are_those_of_peft(name: str, rules: str, targets: Any) -> None:
    rslora = "rslora" in rules
    config = peft.LoraConfig(
        r=4, lora_alpha=6 if rslora else 8, target_modules=targets, use_rslora=rslora, fan_in_fan_out=name == "gpt2"
    )
    ours, theirs = build(name), peft.get_peft_model(build(name), config)
    gp.apply(ours, rules)
    count = same_start(ours, theirs, lambda path: f"base_model.model.{path}")
    assert 2 * count == sum(p.requires_grad for p in theirs.parameters())
    ours.eval()  # no dropout: the two would draw different masks
    theirs.eval()
    data = batches(name, 10)
    mine, reference = train(ours, data), train(theirs, data)
    assert abs(mine[0] - mine[-1]) > 1e-3
    # float32 losses of size 5 or less; the branch is summed in another order, and AdamW amplifies the last bits.
    assert mine == pytest.approx(reference, abs=1e-5)


def test_one_fused_role_is_peft_on_the_whole_with_the_rest_masked() -> None:
    """Queries alone equal PEFT's LoRA of the whole `c_attn` whose B is zero, and stays zero, outside their rows."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True)
    ours, theirs = build("gpt2"), peft.get_peft_model(build("gpt2"), config)
    gp.apply(ours, "q:lora(r=4, alpha=8)")
    for layer, reference in zip(ours.transformer.h, theirs.base_model.model.transformer.h, strict=True):
        _, B, A = layer.attn.c_attn.adapters.default.q.factors
        reference.attn.c_attn.lora_A.default.weight.data.copy_(A.weight.data)
        big = reference.attn.c_attn.lora_B.default.weight
        big.data[:64] = B.weight.data
        mask = torch.zeros_like(big)
        mask[:64] = 1
        big.register_hook(lambda grad, mask=mask: grad * mask)
    data = batches("gpt2", 10)
    ours.eval()
    theirs.eval()
    # A masked gradient of zero moves nothing in AdamW, and the decay of a zero neither.
    mine, reference_losses = train(ours, data), train(theirs, data)
    assert mine == pytest.approx(reference_losses, abs=1e-5)


def test_only_the_active_adapter_trains() -> None:
    model = build("llama")
    gp.apply(model, "qv:lora", name="first")
    gp.apply(model, "o:lora", name="second")
    gp.activate(model, ("first", "second"))
    gp.activate(model, "second")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    # All parameters, as many scripts do: those that get no gradient stay.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    model(**batches("llama", 1)[0]).loss.backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    # A's gradient is zero in the first step, for B is zero.
    assert moved == {n for n in adapters(model, "second") if ".factors.0." in n}


def test_adapter_dropout_is_on_in_training_only() -> None:
    model = build("llama")
    example = call("llama", model)
    gp.apply(model, "qv:lora(dropout=0.5)")
    randomize(model)
    first = outputs(model, example)
    model.train()
    assert not torch.equal(outputs(model, example)[0], outputs(model, example)[0])
    model.eval()
    assert torch.equal(outputs(model, example)[0], first[0])
