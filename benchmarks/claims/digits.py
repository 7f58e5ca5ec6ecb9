"""scikit-learn's 1,797 handwritten digits: models are pretrained on upright ones and adapted to ones turned by 90°.

The split is by position in the file, where the images of one writer stand together, so few writers are on two sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

PARTS = {"source": range(797), "train": range(797, 1197), "validation": range(1197, 1447), "test": range(1447, 1797)}
"""Upright images of `source` pretrain; the other three are turned."""


@dataclass(frozen=True)
class Labeled:
    """Inputs (n, ...) and labels (n,)."""

    x: Tensor
    y: Tensor

    def take(self, index: Tensor) -> Labeled:
        return Labeled(self.x[index], self.y[index])


@cache
def part(name: str) -> Labeled:
    """Images (n, 1, 8, 8) in [0, 1]."""
    data = load_digits()
    images = data.images[list(PARTS[name])] / 16
    turned = images if name == "source" else np.rot90(images, axes=(1, 2)).copy()
    labels = data.target[list(PARTS[name])]
    return Labeled(torch.tensor(turned, dtype=torch.float32)[:, None], torch.tensor(labels))


def shots(data: Labeled, each: int, seed: int) -> Labeled:
    """`each` random examples of every class; the same for every method of one seed."""
    rng = np.random.default_rng(seed)
    rows = [np.flatnonzero(data.y.numpy() == label) for label in sorted(set(data.y.tolist()))]
    return data.take(torch.from_numpy(np.concatenate([rng.choice(row, each, replace=False) for row in rows])))


def pretrain(model: nn.Module, data: Labeled, steps: int, lr: float, batch: int = 64) -> nn.Module:
    """Adam on random batches, the rate falling to zero; returns the model, frozen and in evaluation."""
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        chosen = data.take(torch.randint(len(data.y), (batch,), generator=draw))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(chosen.x), chosen.y).backward()
        optimizer.step()
    return model.requires_grad_(False).eval()


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor], data: Labeled) -> float:
    """In percent."""
    return 100 * float((model(data.x).argmax(-1) == data.y).float().mean())


@cache
def mlp(steps: int = 1500) -> nn.Module:
    """64-128-128-10, for images (n, 1, 8, 8)."""
    torch.manual_seed(0)
    layers = nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    model = nn.Sequential(*layers)
    source = part("source")
    return pretrain(model, Labeled(source.x.flatten(1), source.y), steps, lr=3e-3)


class ViT(nn.Module):
    """Two layers of width 64 over 16 patches of 2 × 2 pixels, and a linear head on what the class token becomes."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTModel

        config = ViTConfig(
            image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.encoder = ViTModel(config, add_pooling_layer=False)
        self.head = nn.Linear(64, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.encoder(pixel_values=pixel_values).last_hidden_state[:, 0])


@cache
def vit(steps: int = 600) -> nn.Module:
    torch.manual_seed(0)
    return pretrain(ViT(), part("source"), steps, lr=2e-3)
