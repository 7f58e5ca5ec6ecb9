"""An ordinary training loop: once `gp.apply` has returned, a model with adapters trains like any other."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from graphpeft.demo.model import Batch


def fit(
    model: nn.Module,
    training: Sequence[Batch],
    *,
    epochs: int,
    lr: float,
    seed: int,
    report: Callable[[float], None] = lambda loss: None,
) -> list[float]:
    """Train all parameters that require gradients, with AdamW and linear warm-up and decay; returns each step's loss.

    `report` is called with the loss after every step.
    """
    torch.manual_seed(seed)
    order = random.Random(seed)
    steps = epochs * len(training)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=lr, weight_decay=0.0, fused=True
    )  # fused into one kernel, because there are many small tensors
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
    )
    losses: list[float] = []
    model.train()
    for _ in range(epochs):
        for batch in order.sample(list(training), len(training)):
            loss = nn.functional.cross_entropy(model(**batch.inputs), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            report(losses[-1])
    model.eval()
    return losses


@torch.no_grad()
def logits(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Logits (texts, classes) of all batches, in order."""
    return torch.cat([model(**batch.inputs) for batch in batches])


def accuracy(scores: Tensor, batches: Sequence[Batch]) -> float:
    """The share of texts whose largest logit is their label's."""
    labels = torch.cat([batch.labels for batch in batches])
    return (scores.argmax(1) == labels).float().mean().item()
