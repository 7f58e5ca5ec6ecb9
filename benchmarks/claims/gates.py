"""E5: does B-LoRA find ranks and precisions with fewer bit operations? The ViT on turned digits, r = 8, a sweep of λ.

Gates are random in training and decided in evaluation; accuracy is measured on the compacted model, which has only what
they left. One λ weighs bits and ranks alike. With E at zero nothing but E learns at first, so where E starts is chosen
together with the rate.
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
from graphpeft.rewrite.state import get_state

LAMBDAS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
STARTS = (0, 1, 4)
"""Of E."""
GATE_LR = 1e-1
TUNING = 100
Setting = tuple[float | None, int | None, float]
"""λ, start of E and rate."""


@dataclass(frozen=True)
class Job:
    lam: float | None
    """Without one, plain LoRA."""
    start: int | None
    """Of E, for B-LoRA."""
    lr: float
    seed: int
    steps: int
    part: str = "validation"

    @property
    def method(self) -> str:
        if self.lam is None:
            return "lora(r=8)"
        return f"blora(r=8, start={self.start}, lambda_bits={self.lam}, lambda_rank={self.lam}, cost=bop)"


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
        "method": one.method,
        "gated": gated, "accuracy": digits.accuracy(model, held), "share": shares, "bops": count.adapters,
        "total": count.total, "rank": mean(method.r for method in left),
        "bits": [mean(tensor) for tensor in zip(*bits, strict=True)],
    }  # fmt: skip


def run(seeds: range, tuning: int, steps: int, lambdas: tuple[float, ...] = LAMBDAS) -> dict[str, Any]:
    """Choose for LoRA and for B-LoRA without a penalty on tuning seeds, then run the reported seeds."""
    lora, gated = [(None, None, lr) for lr in RATES], [(0.0, start, lr) for start in STARTS for lr in RATES]
    jobs = [Job(*one, TUNING + i, steps) for one in (*lora, *gated) for i in range(tuning)]
    tuned = parallel(work, jobs, "E5: rates and starts")
    _, start, lr = _best(gated, tuned)
    reported = [_best(lora, tuned), *((lam, start, lr) for lam in lambdas)]
    jobs = [Job(*one, seed, steps, "test") for seed in seeds for one in reported]
    return {"runs": parallel(work, jobs, "E5: reported seeds"), "tuning": tuned}


def _best(settings: list[Setting], tuned: list[dict[str, Any]]) -> Setting:
    """Of (λ, start, rate), by mean accuracy on the validation part."""
    keys = ("lam", "start", "lr")
    return max(settings, key=lambda s: mean(one["accuracy"] for one in tuned if tuple(one[k] for k in keys) == s))
