"""Random streams that depend on names, never on the order in which adapters are attached."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, *names: str) -> np.random.RandomState:
    """The random stream of `(seed, *names)`.

    NumPy froze the streams of `RandomState` for good (NEP 19), so tensors regenerated from a seed are the same on every
    device and with every later version of NumPy and PyTorch.
    """
    digest = hashlib.sha256("\0".join([str(seed), *names]).encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4").astype(np.uint32))
