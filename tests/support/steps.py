"""A plain training loop on random batches, and PEFT's adapters started from the weights of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def batches(name: str, steps: int) -> list[dict[str, Tensor]]:
    """The same random batches every time; three classes for the classifier, next tokens otherwise."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for _ in range(steps):
        ids = torch.randint(3, 128, (4, 9), generator=generator)
        labels = torch.randint(0, 3, (4,), generator=generator) if name == "bert" else ids
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def train(model: Any, data: list[dict[str, Tensor]], lr: float = 1e-2) -> list[float]:
    """Losses of AdamW, one step per batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for batch in data:
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def same_start(ours: nn.Module, theirs: nn.Module, name: Callable[[str], str]) -> int:
    """Give PEFT's adapter the initial weights of ours; returns how many projections there are."""
    named = dict(theirs.named_parameters())
    count = 0
    for path, module in ours.named_modules():
        slots = getattr(module, "adapters", None)
        for chain in slots.default.values() if isinstance(slots, nn.Module) else ():
            B, A = chain.factors
            for letter, factor in (("A", A), ("B", B)):
                named[name(f"{path}.lora_{letter}.default.weight")].data.copy_(factor.weight.data)
            count += 1
    return count
