"""Small training runs that tests compare: with Trainer, and in a plain loop, in one process or in several."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import transformers as tf
from checks import adapters, build, randomize
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import graphpeft as gp
from graphpeft.rewrite.state import get_state
from graphpeft.train import AdapterCallback, since

Prior = Literal["closed", "trained"]
PRIORS: tuple[Prior, ...] = ("closed", "trained")
BATCH, STEPS, RATE = 16, 4, 0.5


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """As many sequences of equal length as one batch, so that every step sees all, in whatever order."""

    def __init__(self, n: int = BATCH) -> None:
        self.ids = torch.randint(3, 128, (n, 8), generator=torch.Generator().manual_seed(2))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


@cache
def made(prior: Prior) -> nn.Module:
    """A Llama with noise large enough, and a penalty strong enough, to be seen in few steps."""
    model = gp.apply(build("llama"), "qv:lora(r=4)")
    randomize(model, std=0.1)
    gp.PAC(examples=BATCH, gamma=10.0, sigma=0.1, prior=prior).attach(model)
    for p in adapters(model).values():
        p.data.add_(0.02)  # away from the prior's center, where the penalty pulls nowhere
    return model.train()


def adapted(prior: Prior = "closed") -> tuple[Any, gp.PAC]:
    """The same model every time, and the objective that is its own."""
    model = copy.deepcopy(made(prior))
    return model, get_state(model).adapters["default"].objective


def trainer(model: nn.Module, folder: str | Path, *callbacks: Any, **options: Any) -> tf.Trainer:
    """SGD, for its steps are linear in the gradient: AdamW's first ones take the sign of what rounding left."""
    arguments = dict(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=RATE,
        optim="sgd", lr_scheduler_type="constant", logging_steps=1, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False, max_grad_norm=0.0,
    )  # fmt: skip
    made = tf.TrainingArguments(**(arguments | options))
    return tf.Trainer(model=model, args=made, train_dataset=Rows(), eval_dataset=Rows(), callbacks=list(callbacks))


def losses(run: tf.Trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in run.state.log_history if key in entry]


def state(model: nn.Module) -> dict[str, list[float]]:
    return {name: p.detach().flatten().tolist() for name, p in adapters(model).items()}


def plain_loop(
    model: Any,
    pac: gp.PAC,
    micro: int = BATCH,
    adds: bool = True,
    workers: int = 1,
    rank: int = 0,
    wrap: Callable[[Any], Any] = DistributedDataParallel,
) -> list[float]:
    """Mean losses of SGD on all rows, `micro` at a time; the penalty is added by the optimizer or to the loss."""
    runs = wrap(model) if workers > 1 else model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=RATE)
    if adds:
        gp.add_penalties(model, optimizer)
    mine = Rows().ids[rank::workers].split(micro)
    found = []
    for step in range(STEPS):
        pac.step = step
        optimizer.zero_grad()
        total = torch.zeros(())
        for ids in mine:
            loss = runs(input_ids=ids, labels=ids).loss / len(mine)
            total += loss.detach()
            (loss if adds else loss + gp.penalty(model) / len(mine)).backward()
        optimizer.step()
        if workers > 1:
            dist.all_reduce(total)
        found.append(float(total) / workers)
    return found


def everything(workers: int = 1, rank: int = 0) -> dict[str, Any]:
    """Losses and trained tensors of each kind of run; the batch is the same however many processes share it."""
    found: dict[str, Any] = {}

    def disturb(*now: Any) -> None:
        torch.rand(rank)  # processes have random states of their own

    for prior in PRIORS:
        model, pac = adapted(prior)
        with tempfile.TemporaryDirectory() as folder:
            run = trainer(
                model,
                folder,
                AdapterCallback(since(0.75, pac.freeze), disturb),
                per_device_train_batch_size=BATCH // workers,
            )
            run.train()
        found[f"trainer {prior}"] = losses(run), losses(run, "penalty"), state(model)
    for adds in (True, False):  # without find_unused_parameters
        model, pac = adapted("trained")
        disturb()
        found[f"loop {adds}"] = plain_loop(model, pac, adds=adds, workers=workers, rank=rank), [], state(model)
    return found
