"""The grid of small models and methods that the behaviors are tested on: PEFT's kinds of models, our rules for them.

A cell is adapted once and copied for every test, because most of the time would go to the capture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from checks import build, call, outputs, randomize
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import graphpeft as gp
from graphpeft.methods import builtin

Call = tuple[tuple[Any, ...], dict[str, Any]]


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(12, 20), nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(torch.relu(self.lin0(x)))


class EmbConv1D(nn.Module):
    """An embedding, then transformers' `Conv1D`, a projection whose weight is stored (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv1d, self.lin0 = nn.Embedding(40, 8), Conv1D(4, 8), nn.Linear(28, 3)
        nn.init.normal_(self.conv1d.weight, std=0.4)  # its own 0.02 would hide what is adapted before it

    def forward(self, ids: Tensor) -> Tensor:
        return self.lin0(torch.relu(self.conv1d(self.emb(ids))).flatten(1))


class Conv2D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv2d, self.lin0 = nn.Conv2d(4, 8, 3), nn.Linear(200, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(torch.relu(self.conv2d(x)).flatten(1))


class MHA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha, self.lin0 = nn.MultiheadAttention(16, 2), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.mha(x, x, x, need_weights=False)[0])


HAND_MADE: dict[str, Callable[[], nn.Module]] = {"mlp": MLP, "emb_conv1d": EmbConv1D, "conv2d": Conv2D, "mha": MHA}
TRANSFORMERS = ("llama", "gpt2", "bert", "t5")
MODELS = (*HAND_MADE, *TRANSFORMERS)
TARGETS = {
    "mlp": ("path(lin0)", "path(lin1)"),
    "emb_conv1d": ("embed", "path(conv1d)"),
    "conv2d": ("conv", "path(lin0)"),
    "mha": ("qv", "o"),
} | dict.fromkeys(TRANSFORMERS, ("qv", "down"))
"""Two sets of sites that have nothing in common."""
METHODS = {
    "lora": "lora(r=4, alpha=8)",
    "rslora": "lora(r=4, alpha=8, rslora=true)",
    "dora": "dora(r=4)",
    "olora": "olora(r=4)",
    "pissa": "pissa(r=4)",
    "vera": "vera(r=8)",
    "melora": "melora(n=2, r=2)",
    "rlora": "rlora(r=8)",
    "blora": "blora(r=4)",
}
METHODS |= {m.name: next(iter(m.examples), m.name) for m in builtin() if m.name not in METHODS}


def fresh(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A bare model in eval mode, the same weights every time."""
    if name not in HAND_MADE:
        model = build(name, dtype=dtype)
        if name == "bert":  # its own 0.02 would hide what is adapted before it
            nn.init.normal_(model.get_parameter("classifier.weight"), std=0.4)
        return model
    torch.manual_seed(0)
    return HAND_MADE[name]().to(dtype).eval()


@cache
def example(name: str, dtype: torch.dtype = torch.float32) -> Call:
    """(args, kwargs) of a call."""
    if name not in HAND_MADE:
        return call(name, fresh(name, dtype))
    generator = torch.Generator().manual_seed(1)
    if name == "emb_conv1d":
        return (torch.randint(0, 40, (3, 7), generator=generator),), {}
    shape = {"mlp": (5, 12), "conv2d": (3, 4, 7, 7), "mha": (5, 3, 16)}[name]
    return (torch.randn(shape, generator=generator).to(dtype),), {}


def given(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The `inputs=` that the model needs."""
    return example(name, dtype)[0] if name in HAND_MADE else None


def run(name: str, model: nn.Module) -> list[Tensor]:
    return outputs(model, example(name, next(model.parameters()).dtype))


def apply(name: str, model: nn.Module, rules: str, /, std: float | None = 0.2, **options: Any) -> nn.Module:
    """`gp.apply` by the model's example; then random numbers, for a fresh adapter changes nothing."""
    gp.apply(model, rules, inputs=given(name, next(model.parameters()).dtype), **options)
    model.eval()
    if std is not None:
        randomize(model, options.get("name", "default"), std)
    return model


def rules(name: str, method: str) -> str:
    """The method on both sets of sites."""
    return "; ".join(f"{target}:{METHODS.get(method, method)}" for target in TARGETS[name])


def close(one: Iterable[Tensor], other: Iterable[Tensor], tolerance: float) -> bool:
    """As PEFT compares outputs: the same number for absolute and relative differences."""
    return all(torch.allclose(a, b, atol=tolerance, rtol=tolerance) for a, b in zip(one, other, strict=True))


@dataclass(frozen=True)
class Cell:
    """A model and a method."""

    name: str
    method: str

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return fresh(self.name, dtype)

    def untrained(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return copy.deepcopy(_made(self.name, self.method, dtype))

    def adapted(self, dtype: torch.dtype = torch.float32, std: float = 0.2) -> nn.Module:
        """With random numbers in the adapter, as training would leave it."""
        model = self.untrained(dtype)
        randomize(model, std=std)
        return model

    def run(self, model: nn.Module) -> list[Tensor]:
        return run(self.name, model)

    def __str__(self) -> str:
        return f"{self.name}-{self.method}"


@cache
def _made(name: str, method: str, dtype: torch.dtype) -> nn.Module:
    return apply(name, fresh(name, dtype), rules(name, method), std=None)


def models(*more: str) -> pytest.MarkDecorator:
    """Parametrize a test by the hand-made models and these; the others are marked as slow."""
    default = {*HAND_MADE, *more}
    return pytest.mark.parametrize(
        "name", [name if name in default else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
    )


def _by_default(model: str, method: str) -> bool:
    """Every method on every hand-made model, and on one of the transformers: each in turn."""
    return model in HAND_MADE or [*METHODS].index(method) % len(TRANSFORMERS) == TRANSFORMERS.index(model)


def cells(models: Iterable[str] = MODELS, methods: Iterable[str] = METHODS) -> pytest.MarkDecorator:
    """Parametrize a test by cells of the grid; those that are not run by default are marked as slow."""
    listed = [Cell(model, method) for model in models for method in methods]
    marked = [
        pytest.param(cell, id=str(cell), marks=() if _by_default(cell.name, cell.method) else pytest.mark.slow)
        for cell in listed
    ]
    return pytest.mark.parametrize("cell", marked)
