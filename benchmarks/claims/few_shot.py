"""E4: does the PAC-Bayes regularizer help adapters that see few examples?

Four arms: no regularizer, decay toward the initial values (AdamW's would pull VeRA's and RLoRA's inner vector to zero),
noise of fixed size without the KL, and PAC. Every number is chosen on tuning seeds, which are not reported, by accuracy
on a validation part: rates in each cell; γ, σ₀ and the strength of decay once for a data set and method, at the fewest shots.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product
from statistics import mean
from typing import Any

import digits
import names
import torch
from digits import Labeled, accuracy, shots
from torch import Tensor, nn
from workers import parallel

import graphpeft as gp

SHOTS = {"digits": (2, 5, 10), "names": (4, 16)}
METHODS = {"rlora(r=64)": (3e-2, 1e-1, 3e-1), "vera(r=64)": (3e-2, 1e-1, 3e-1), "lora(r=4)": (3e-3, 1e-2, 3e-2)}
"""Each with the rates of its sweep, the same for all arms; it is widened where the best is at an end."""
TRIED = {"digits": tuple(METHODS), "names": ("rlora(r=64)", "lora(r=4)")}
ARMS = ("none", "decay", "noise", "pac")
TUNING = 1000


@dataclass(frozen=True)
class Setting:
    """An arm and its numbers."""

    arm: str
    decay: float = 0.0
    sigma: float | None = None
    gamma: float | None = None


SETTINGS = (
    Setting("none"),
    *(Setting("decay", decay=decay) for decay in (0.03, 0.1, 0.3, 1.0)),
    *(Setting("noise", sigma=sigma) for sigma in (0.03, 0.1)),
    *(Setting("pac", sigma=sigma, gamma=gamma) for sigma, gamma in product((0.03, 0.1), (1e1, 1e2, 1e3, 1e4))),
)


@dataclass(frozen=True)
class Job:
    data: str
    method: str
    k: int
    setting: Setting
    lr: float
    seed: int
    steps: int
    part: str = "validation"


def work(job: Job) -> dict[str, Any]:
    """Adapt to `k` examples of each class; the seed gives the examples, the adapter and the noise."""
    model, few, held = _task(job)
    rules = f"path(0.weight):{job.method}; path(2.weight):{job.method}"
    before = accuracy(model, held)
    gp.apply(model, rules, inputs=(few.x,), seed=job.seed, verify="off")
    torch.manual_seed(job.seed)
    trained = gp.trainable(model)[0]
    found = _fit(model, few, job)
    return asdict(job) | {"before": before, "accuracy": accuracy(model.eval(), held), "trained": trained} | found


def _task(job: Job) -> tuple[nn.Module, Labeled, Labeled]:
    if job.data == "names":
        few = shots(names.part("train"), job.k, job.seed)
        return names.with_head(few), few, names.part(job.part)
    few, held = (Labeled(data.x.flatten(1), data.y) for data in (digits.part("train"), digits.part(job.part)))
    return copy.deepcopy(digits.mlp()), shots(few, job.k, job.seed), held


def _fit(model: nn.Module, few: Labeled, job: Job) -> dict[str, Any]:
    """Adam on all examples at once, rates falling to zero; returns what PAC ended with."""
    pac = None
    weights = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in weights]
    if job.setting.sigma is not None:
        pac = gp.PAC(examples=len(few.y), gamma=job.setting.gamma or 1.0, sigma=job.setting.sigma).attach(model)
        if job.setting.gamma is None:
            pac.freeze(model)
    optimizer = torch.optim.Adam(gp.parameter_groups(model, job.lr))
    gp.add_penalties(model, optimizer)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, job.steps)
    model.train()
    for _ in range(job.steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(few.x), few.y)
        loss.backward()
        optimizer.step()
        _decay(weights, start, job.setting.decay * schedule.get_last_lr()[0])
        schedule.step()
    return {"loss": loss.item()} | (_report(pac, model, loss.item()) if pac else {})


@torch.no_grad()
def _decay(weights: list[Tensor], start: list[Tensor], share: float) -> None:
    if share:
        torch._foreach_lerp_(weights, start, share)


def _report(pac: gp.PAC, model: nn.Module, loss: float) -> dict[str, Any]:
    sigmas = torch.cat([p.detach().exp().flatten() for n, p in model.named_parameters() if n.endswith("log_sigma")])
    tenths = torch.tensor([0.1, 0.5, 0.9])
    return {"kl": pac.kl(model).item(), "bound": pac.bound(model, loss), "sigmas": sigmas.quantile(tenths).tolist()}


def run(seeds: int, others: int, tuning: int, steps: int, short: bool = False) -> dict[str, Any]:
    """Tune in stages, then run the reported seeds, `others` of them in cells that do not decide; everything that was run."""
    cells = [(data, method, k) for data, ks in SHOTS.items() for method in TRIED[data] for k in ks]
    deciding = [cell for cell in cells if cell[2] == SHOTS[cell[0]][0]]
    cells = deciding if short else cells
    tuned: list[dict[str, Any]] = []

    def sweep(wanted: Iterable[tuple[Cell, Setting, float]], title: str) -> None:
        seeds = range(TUNING, TUNING + tuning)
        tuned.extend(parallel(work, [Job(*c, s, lr, seed, steps) for c, s, lr in wanted for seed in seeds], title))

    none = Setting("none")
    sweep([(c, none, lr) for c in cells for lr in METHODS[c[1]]], "E4: rates without a regularizer")
    rates = {c: best_rate(tuned, c, none) for c in cells}
    sweep([(c, s, rates[c]) for c in deciding for s in SETTINGS if s != none], "E4: γ, σ and decay")
    chosen = {(c, arm): best_setting(tuned, (*c[:2], SHOTS[c[0]][0]), arm) for c in cells for arm in ARMS}
    tried = {(c, s): _scores(tuned, c, s) for (c, _), s in chosen.items()}
    sweep([(*key, lr) for key in tried for lr in METHODS[key[0][1]] if lr not in tried[key]], "E4: rates of each arm")
    for _ in range(2):
        sweep([(c, s, lr) for (c, _), s in chosen.items() for lr in beyond(tuned, c, s)], "E4: wider sweeps")
    jobs = [
        Job(*c, s, best_rate(tuned, c, s), seed, steps, "test")
        for (c, _), s in chosen.items()
        for seed in range(seeds if c in deciding else others)
    ]
    return {"runs": [_short(one) for one in parallel(work, jobs, "E4: reported seeds")], "sweeps": _sweeps(tuned)}


def _short(one: dict[str, Any]) -> dict[str, Any]:
    setting = {name: value for name, value in one["setting"].items() if value}
    return {name: value for name, value in one.items() if name not in ("steps", "part")} | {"setting": setting}


def _sweeps(tuned: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Validation accuracies of the tuning seeds for everything that was tried."""
    found: dict[str, dict[str, Any]] = {}
    for one in map(_short, tuned):
        key = {name: one[name] for name in ("data", "method", "k", "setting", "lr")}
        found.setdefault(str(key), key | {"accuracies": []})["accuracies"].append(one["accuracy"])
    return list(found.values())


Cell = tuple[str, str, int]
"""Data, method, shots."""


def _scores(tuned: list[dict[str, Any]], cell: Cell, setting: Setting) -> dict[float, float]:
    """Mean validation accuracy by rate."""
    by_rate = defaultdict(list)
    for one in tuned:
        if (one["data"], one["method"], one["k"]) == cell and one["setting"] == asdict(setting):
            by_rate[one["lr"]].append(one["accuracy"])
    return {lr: mean(values) for lr, values in by_rate.items()}


def best_rate(tuned: list[dict[str, Any]], cell: Cell, setting: Setting) -> float:
    scores = _scores(tuned, cell, setting)
    return max(scores, key=scores.__getitem__)


def best_setting(tuned: list[dict[str, Any]], cell: Cell, arm: str) -> Setting:
    scores = {s: _scores(tuned, cell, s) for s in SETTINGS if s.arm == arm}
    return max(scores, key=lambda setting: max(scores[setting].values()))


def beyond(tuned: list[dict[str, Any]], cell: Cell, setting: Setting) -> list[float]:
    """The next rate where the best one is at an end of its sweep."""
    scores = _scores(tuned, cell, setting)
    best, rates = max(scores, key=scores.__getitem__), sorted(scores)
    ends = {rates[0]: rates[0] / 10**0.5, rates[-1]: rates[-1] * 10**0.5}
    return [float(f"{ends[best]:.1g}")] if best in ends and len(rates) > 1 else []
