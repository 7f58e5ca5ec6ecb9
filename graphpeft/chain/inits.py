"""Initial values of a factor's tensors: each init is a callable `(tensor, rng)` that fills a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

Init = Callable[[Tensor, np.random.RandomState], None]


def zeros() -> Init:
    """All zeros."""
    return constant(0.0)


def constant(value: float) -> Init:
    """Every entry equal to `value`."""
    return partial(_constant, value=value)


def normal(std: float) -> Init:
    """Independent Gaussians of mean zero and standard deviation `std`."""
    return partial(_normal, std=std)


def kaiming(a: float = math.sqrt(5)) -> Init:
    """Uniform on ±√(6 / ((1 + a²) · fan_in)), where fan_in is the size of the last axis (He et al., 2015).

    The default `a` gives ±1/√fan_in: `nn.Linear` uses it for its weight, and LoRA for A.
    """
    return partial(_kaiming, a=a)


@torch.no_grad()
def fill(tensor: Tensor, values: np.ndarray[Any, Any]) -> None:
    """Copy `values` into `tensor`, cast to its dtype and moved to its device."""
    tensor.copy_(torch.tensor(values, device="cpu"))


# Partial applications of module-level functions, not closures: models that hold them can be pickled.


def _constant(tensor: Tensor, rng: np.random.RandomState, value: float) -> None:
    fill(tensor, np.full(tensor.shape, value))


def _normal(tensor: Tensor, rng: np.random.RandomState, std: float) -> None:
    fill(tensor, rng.normal(0.0, std, size=tensor.shape))


def _kaiming(tensor: Tensor, rng: np.random.RandomState, a: float) -> None:
    bound = math.sqrt(6 / ((1 + a**2) * tensor.shape[-1]))
    fill(tensor, rng.uniform(-bound, bound, size=tensor.shape))
