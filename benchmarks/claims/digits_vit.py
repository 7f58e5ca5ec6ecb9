"""Experiments E1 to E3 on digits: the small ViT, pretrained on upright digits, adapted to turned ones in all linear maps."""

from __future__ import annotations

import copy

import digits
import numpy as np
import torch
from digits import Labeled
from run_record import Run, ranks
from torch import nn

import graphpeft as gp

BATCH = 32


def adapt(method: str, lr: float, seed: int, steps: int, checkpoints: tuple[int, ...], part: str) -> Run:
    """The seed gives the data order and the adapter."""
    model = copy.deepcopy(digits.vit())
    held, training = digits.part(part), digits.part("train")
    curve = {0: digits.accuracy(model, held)}
    gp.apply(model, f"attn:{method}; mlp:{method}", inputs=(training.x[:2],), seed=seed, verify="off")
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(gp.parameter_groups(model, lr))
    for done in train(model, optimizer, training, steps, seed):
        if done in (*checkpoints, steps):
            curve[done] = digits.accuracy(model.eval(), held)
            model.train()
    return Run(method, lr, seed, gp.trainable(model)[0], curve, ranks(model))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Labeled, steps: int, seed: int):
    """Random batches, all rates falling to zero; yields the number of steps done after each."""
    order = np.random.default_rng(1000 + seed)
    rates = [group["lr"] for group in optimizer.param_groups]
    model.train()
    for step in range(steps):
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr * (1 - step / steps)
        chosen = data.take(torch.from_numpy(order.integers(0, len(data.y), BATCH)))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(chosen.x), chosen.y).backward()
        optimizer.step()
        yield step + 1
