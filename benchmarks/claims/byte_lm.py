"""The byte language model of experiments E1 to E3: pretrained on prose, adapted to code, both from the standard library.

Text changes with the version of Python, so `corpus()` is reported by its SHA-256 with every result.
"""

from __future__ import annotations

import copy
import hashlib
import math
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from run_record import Run, ranks
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import graphpeft as gp

LENGTH, BATCH = 96, 16
Loss = float


@dataclass(frozen=True)
class Corpus:
    """Bytes of the two domains, and of the second a held-out part that no step sees."""

    prose: np.ndarray
    code: np.ndarray
    held_out: np.ndarray
    digest: str


@cache
def corpus() -> Corpus:
    """Python's own documentation and modules. Whole files are held out, every eighth by name."""
    prose = "\n".join(topics[key] for key in sorted(topics)).encode()
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(folder.glob("*.py")) if path.stat().st_size < 60_000]
    train = b"\n".join(path.read_bytes() for i, path in enumerate(files) if i % 8)
    held = b"\n".join(path.read_bytes() for i, path in enumerate(files) if not i % 8)
    digest = hashlib.sha256(prose + train + held).hexdigest()
    return Corpus(*(np.frombuffer(part, np.uint8) for part in (prose, train, held)), digest)


def batches(data: np.ndarray, steps: int, seed: int) -> list[Tensor]:
    """`steps` batches (BATCH, LENGTH) of random windows; the same for every method of one seed."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(data) - LENGTH, (steps, BATCH))
    return [torch.from_numpy(np.stack([data[s : s + LENGTH] for s in row]).astype(np.int64)) for row in starts]


@cache
def pretrained(steps: int, width: int = 64) -> LlamaForCausalLM:
    """A two-layer model of the prose; its seed is fixed, for every method and seed adapts the same base."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    fit(model, batches(corpus().prose, steps, seed=0), lr=3e-3)
    return model


def fit(model: torch.nn.Module, data: list[Tensor], lr: float, checkpoints: tuple[int, ...] = ()) -> dict[int, Loss]:
    """AdamW with linear decay; held-out bits per byte at the checkpoints (steps done)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    measured = {}
    model.train()
    for step, tokens in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / len(data))
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        if step + 1 in checkpoints:
            measured[step + 1] = bits(model)
    return measured


@torch.no_grad()
def bits(model: torch.nn.Module) -> float:
    """Bits per byte on held-out code; the same windows always."""
    model.eval()
    data = batches(corpus().held_out, 12, seed=123)
    losses = [float(model(input_ids=tokens, labels=tokens, use_cache=False).loss) for tokens in data]
    model.train()
    return sum(losses) / len(losses) / math.log(2)


def adapt(method: str, lr: float, seed: int, steps: int, checkpoints: tuple[int, ...], part: str) -> Run:
    """Adapt every linear map of the pretrained model to code. The seed gives the data order and the adapter.

    Both parts are measured on the same held-out files: rates are chosen on a seed that is not reported, not on other text.
    """
    model = copy.deepcopy(pretrained(steps=steps * 20 // 3))
    start = bits(model)
    gp.apply(model, f"attn:{method}; mlp:{method}", seed=seed, verify="off")
    torch.manual_seed(seed)
    curve = fit(model, batches(corpus().code, steps, seed=1000 + seed), lr, (*checkpoints, steps))
    return Run(method, lr, seed, gp.trainable(model)[0], {0: start} | curve, ranks(model))
