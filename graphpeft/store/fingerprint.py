"""A hash of base weights: their names, shapes and some values of each, enough to tell checkpoints apart."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import torch

VERSION = 2
"""Version 1 read every nth value, which is one column where the rows have a length that n divides."""
MARK = f"{VERSION}:"
SHAPE = rf"({MARK})?[0-9a-f]{{64}}"
"""A pattern of fingerprints; those of version 1 are a digest alone."""
WHOLE, RUNS, LONG = 4096, 64, 16
"""Weights of up to so many values are read whole, others at so many places, so many values at each."""
STEP = 2654435769
"""2^32 divided by the golden ratio: its multiples are spread evenly."""


def version(fingerprint: str) -> int:
    return VERSION if fingerprint.startswith(MARK) else 1


def fingerprint(names: Iterable[str], weight_of: Callable[[str], torch.Tensor], version: int = VERSION) -> str:
    """The fingerprint of weights, which are requested one at a time, because a quantized one is dequantized for it.

    Values are rounded to bfloat16, so that a float32 checkpoint and its bfloat16 copy count as the same base.
    """
    digest = hashlib.sha256()
    for name in sorted(set(names)):
        weight = weight_of(name)
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        if not weight.is_meta:
            flat = weight.detach().flatten()
            read = torch.cat([flat[begin : begin + length] for begin, length in looked_at(flat.numel(), version)])
            digest.update(read.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest() if version == 1 else MARK + digest.hexdigest()


def looked_at(count: int, version: int) -> list[tuple[int, int]]:
    """Which of a weight's values its fingerprint depends on: runs, by their first place and their length."""
    if version == 1:
        return [(place, 1) for place in range(0, count, max(1, count // 64))[:64]] or [(0, 0)]
    if count <= WHOLE:
        return [(0, count)]
    # One run in each part of the weight, at another place of each part, so that they meet all rows and columns alike.
    parts = [(part * count // RUNS, (part + 1) * count // RUNS) for part in range(RUNS)]
    return [
        (begin + (part * STEP % 2**32 * (end - begin - LONG) >> 32), LONG) for part, (begin, end) in enumerate(parts)
    ]
