"""Inputs for comparing two runtimes: sizes that were not traced, padding, and for decoders a prompt and a single token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from graphpeft.exporting.cache import PAST, SEQUENCE, TOTAL

Outputs = Mapping[str, np.ndarray]
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """Inputs of one batch size and length."""

    label: str
    inputs: Tensors

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {name: tensor.cpu().numpy() for name, tensor in self.inputs.items()}


def cases(sample: Tensors, axes: Mapping[str, Mapping[int, str]]) -> list[Case]:
    """The sample itself, then a batch of 1 with shorter and a larger batch with longer, padded sequences.

    With a KV cache, padding is on the left, and two cases are added: a prompt and a single token.
    """
    sizes = {axes[name][axis]: sample[name].shape[axis] for name in sample for axis in axes[name]}
    plans: list[dict[str, int]] = []
    for shift in (-1, 1):
        plans.append({axis: size + 2 * shift if size > 3 else size + shift for axis, size in sizes.items()})
        if "batch" in sizes:
            plans[-1]["batch"] = 1 if shift < 0 else sizes["batch"] + 1
    if PAST in sizes:
        plans += [sizes | {PAST: 0}, sizes | {SEQUENCE: 1, PAST: sizes[PAST] + 3}]
    made = [Case(_label(sizes), dict(sample))]
    for plan in plans:
        if TOTAL in sizes:
            plan[TOTAL] = plan[PAST] + plan[SEQUENCE]
        inputs = {name: _resized(tensor.clone(), axes[name], plan) for name, tensor in sample.items()}
        for name, tensor in inputs.items():
            if "mask" in name and tensor.ndim == 2 and min(tensor.shape) > 1:
                tensor[-1, slice(1) if PAST in sizes else slice(-1, None)] = 0
        made.append(Case(_label(plan), inputs))
    return made


def _label(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in sizes.items())


def _resized(tensor: torch.Tensor, axes: Mapping[int, str], sizes: Mapping[str, int]) -> torch.Tensor:
    for axis, name in axes.items():
        index = torch.arange(1, sizes[name] + 1, device=tensor.device) % tensor.shape[axis]
        tensor = tensor.index_select(axis, index)
    return tensor
