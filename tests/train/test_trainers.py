"""The adapter alone trains under other people's loops, to the losses of a plain one, or of PEFT under the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
import transformers as tf
from checks import adapters, build
from torch import nn
from trainers import accelerated, pair

CLOSE = 2e-5
"""float32 losses of size 5 after a few steps of SGD: the branch is summed in another order."""


def compare(losses: Callable[[Any], list[float]]) -> list[float]:
    """Losses of both, which agree; all of our adapter has moved, and nothing of the base."""
    ours, theirs = pair()
    base = {n: p.detach().clone() for n, p in build("llama").named_parameters()}
    start = {n: p.detach().clone() for n, p in adapters(ours).items()}
    mine, reference = losses(ours), losses(theirs)
    assert len(mine) == runs.STEPS
    assert mine == pytest.approx(reference, abs=CLOSE)
    assert mine[0] - mine[-1] > 10 * CLOSE
    assert all(not torch.equal(p, start[n]) for n, p in adapters(ours).items())
    assert all(torch.equal(p, base[n]) for n, p in ours.named_parameters() if n in base)
    return mine


def plain(model: Any) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=runs.RATE)
    ids, found = runs.Rows().ids, []
    for _ in range(runs.STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_trainer_and_accelerate_train_as_a_plain_loop_does(tmp_path: Path) -> None:
    def trained(model: nn.Module) -> list[float]:
        run = runs.trainer(model, tmp_path)
        run.train()
        return runs.losses(run)

    expected = compare(plain)
    assert compare(trained) == pytest.approx(expected, abs=CLOSE)
    assert compare(accelerated) == pytest.approx(expected, abs=CLOSE)


def tokenizer() -> tf.PreTrainedTokenizerFast:
    """One token for each of 128 words, made on the spot."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, 128)}
    made = Tokenizer(models.WordLevel(words, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trainer_of_trl(checkpointing: bool, tmp_path: Path) -> None:
    """TRL brings pyarrow and pandas, 250 MB, so that the extra `test` leaves it out; `pip install trl` to run this."""
    trl = pytest.importorskip(
        "trl", reason="TRL is not among the test requirements: it brings 250 MB of pyarrow and pandas"
    )
    datasets = pytest.importorskip("datasets", reason="TRL's own requirement")
    texts = [" ".join(f"w{i}" for i in row.tolist()) for row in runs.Rows().ids]

    def losses(model: nn.Module) -> list[float]:
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=runs.STEPS, per_device_train_batch_size=runs.BATCH, optim="sgd",
            learning_rate=runs.RATE, lr_scheduler_type="constant", logging_steps=1, report_to=[], save_strategy="no",
            use_cpu=True, bf16=False, disable_tqdm=True, dataloader_pin_memory=False, max_grad_norm=0.0, max_length=16,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        data = datasets.Dataset.from_dict({"text": texts})
        run = trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer())
        run.train()
        return runs.losses(run)

    compare(losses)


@pytest.mark.slow
def test_accelerate_launch() -> None:
    """Two processes on the CPU: accelerate launches several there only as it does for GPUs, without which they use gloo."""
    here = Path(__file__).parents[1] / "support"
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
        "--num_machines=1",
    ]
    options = ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    done = subprocess.run(
        [*launch, *options, str(here / "launched.py")],
        env=os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parents[1]}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [float(line) for line in done.stdout.split()]
    assert found == pytest.approx(accelerated(pair()[0]), abs=CLOSE)
