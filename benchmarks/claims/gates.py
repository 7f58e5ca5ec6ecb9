"""E5: does B-LoRA find ranks and precisions with fewer bit operations? The ViT on turned digits, r = 8, a sweep of λ.

Gates are random in training and decided in evaluation; accuracy is measured on the compacted model, which has only what
they left. One λ weighs bits and ranks alike.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import digits
import torch
from digits_vit import train
from workers import parallel

import graphpeft as gp
from graphpeft.state import get_state

LAMBDAS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
RATES = (3e-3, 1e-2, 3e-2)
GATE_LR = 1e-1
TUNING = 100


@dataclass(frozen=True)
class Job:
    method: str
    lam: float | None
    """Without one, plain LoRA."""
    lr: float
    seed: int
    steps: int
    part: str = "validation"


def job(lam: float | None, lr: float, seed: int, steps: int, part: str = "validation") -> Job:
    gated = f"blora(r=8, lambda_bits={lam}, lambda_rank={lam}, cost=bop)"
    return Job("lora(r=8)" if lam is None else gated, lam, lr, seed, steps, part)


def work(one: Job) -> dict[str, Any]:
    """Adapt, count, compact, and measure again what is left."""
    model = copy.deepcopy(digits.vit())
    data, held = digits.part("train"), digits.part(one.part)
    rules = f"attn:{one.method}; mlp:{one.method}"
    gp.apply(model, rules, inputs=(data.x[:2],), seed=one.seed, verify="off")
    torch.manual_seed(one.seed)
    optimizer = torch.optim.AdamW(gp.parameter_groups(model, one.lr, gate_lr=GATE_LR))
    gp.add_penalties(model, optimizer)
    for _ in train(model, optimizer, data, one.steps, one.seed):
        pass
    model.eval()
    count, gated = gp.bops(model), digits.accuracy(model, held)
    shares = {part: getattr(count, part) / getattr(count.reference, part) for part in ("adapters", "base", "total")}
    if one.lam is not None:
        gp.compact(model)
    left = [entry.method for entry in get_state(model).adapters["default"].entries]
    bits = [getattr(method, "bits", (32, 32)) for method in left]
    return asdict(one) | {
        "gated": gated, "accuracy": digits.accuracy(model, held), "share": shares, "bops": count.adapters,
        "total": count.total, "rank": mean(method.r for method in left),
        "bits": [mean(tensor) for tensor in zip(*bits, strict=True)],
    }  # fmt: skip


def run(seeds: range, tuning: int, steps: int, lambdas: tuple[float, ...] = LAMBDAS) -> dict[str, Any]:
    """Choose LoRA's rate and that of B-LoRA without a penalty on tuning seeds, then run the reported seeds."""
    jobs = [job(lam, lr, TUNING + i, steps) for lam in (None, 0.0) for lr in RATES for i in range(tuning)]
    tuned = parallel(work, jobs, "E5: rates")
    best = {lam: _best([one for one in tuned if one["lam"] == lam]) for lam in (None, 0.0)}
    reported = [(None, best[None]), *((lam, best[0.0]) for lam in lambdas)]
    jobs = [job(lam, lr, seed, steps, "test") for seed in seeds for lam, lr in reported]
    return {"runs": parallel(work, jobs, "E5: reported seeds"), "tuning": tuned}


def _best(tuned: list[dict[str, Any]]) -> float:
    return max(RATES, key=lambda lr: mean(one["accuracy"] for one in tuned if one["lr"] == lr))
