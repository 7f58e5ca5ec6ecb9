"""Our adapter and PEFT's under the same loop of accelerate."""

from __future__ import annotations

from typing import Any

import accelerate
import peft
import runs
import torch
from checks import build
from steps import same_start
from torch import nn

import graphpeft as gp


def pair() -> tuple[Any, Any]:
    """Our adapter and PEFT's, from the same start."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    ours, theirs = gp.apply(build("llama"), "qv:lora(r=4, alpha=8)"), peft.get_peft_model(build("llama"), config)
    same_start(ours, theirs, lambda path: f"base_model.model.{path}")
    return ours, theirs


def accelerated(model: nn.Module) -> list[float]:
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=runs.RATE)
    rows = torch.utils.data.DataLoader(runs.Rows(), batch_size=runs.BATCH // accelerator.num_processes)
    prepared, stepped, loader = accelerator.prepare(model, optimizer, rows)
    found = []
    for _ in range(runs.STEPS):
        for batch in loader:
            loss = prepared(**batch).loss
            stepped.zero_grad()
            accelerator.backward(loss)
            stepped.step()
            found.append(float(accelerator.reduce(loss.detach(), "mean")))
    return found
