"""Experiments E1 to E3 on three tasks: which methods, which rates, how the best rate is chosen, and the reported runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from statistics import mean
from typing import Any

from criteria import Results, verdicts
from run_record import Run
from workers import parallel

TUNING = 100
"""The first seed that chooses learning rates; none of them is reported."""
E1, E2, E3 = (
    ("lora(r=8)", "olora(r=8)", "pissa(r=8)", "olora(r=8, pivot=true)"),
    ("lora(r=8)", "lora(r=1)", "melora(n=8, r=1)"),
    ("lora(r=8)", "lora(r=1)", "lora(r=2)", "lora(r=4)", "vera(r=64)", "vera(r=256)", "rlora(r=64)",
     "rlora(r=64, rows=uniform)", "rlora(r=64, train=in_out)", "rlora(r=64, train=in_mid_out)", "rlora(r=32, train=core)"),
)  # fmt: skip
EXPERIMENTS = {"E1": E1, "E2": E2, "E3": E3}
CENTRAL = ("lora(r=8)", "lora(r=1)", "olora(r=8)", "melora(n=8, r=1)", "vera(r=64)", "rlora(r=64)")


@dataclass(frozen=True)
class Task:
    """A module with an `adapt`, and what is tried there."""

    name: str
    module: str
    unit: str
    falls: bool
    """Whether a better model has a lower score: bits per byte against points of accuracy."""
    methods: tuple[str, ...]
    full: tuple[float, ...]
    """Rates of methods that train matrices."""
    diagonal: tuple[float, ...]
    """Rates of methods that train diagonals."""
    equal: float
    """The small rate at which OLoRA's claim is tested as papers test it: one for all."""
    steps: int
    tuning: int
    """Seeds that choose rates."""
    checkpoints: int = 5
    """After how many sixths of the steps the held-out part is looked at."""

    def rates(self, method: str) -> tuple[float, ...]:
        diagonal = method.startswith(("vera", "rlora")) and "core" not in method
        return self.diagonal if diagonal else self.full


EVERY = tuple(dict.fromkeys(E1 + E2 + E3))
TASKS = {
    task.name: task
    for task in (
        Task("language model", "byte_lm", "bits per byte", True, EVERY, (1e-3, 3e-3, 1e-2, 3e-2), (1e-2, 3e-2, 1e-1, 3e-1),
             equal=3e-3, steps=150, tuning=1),
        Task("digits", "digits_vit", "points", False, (*CENTRAL, "pissa(r=8)", "vera(r=256)"), (3e-3, 1e-2, 3e-2),
             (3e-2, 1e-1, 3e-1), equal=3e-3, steps=150, tuning=2),
        Task("docstrings", "docstrings", "points", False, CENTRAL, (3e-4, 1e-3, 3e-3), (3e-3, 1e-2, 3e-2),
             equal=3e-4, steps=48, tuning=1, checkpoints=1),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    task: Task
    method: str
    lr: float
    seed: int
    steps: int
    part: str


def work(job: Job) -> Run:
    adapt: Callable[..., Run] = import_module(job.task.module).adapt
    checkpoints = tuple(job.steps * sixth // 6 for sixth in range(1, 1 + job.task.checkpoints))
    return adapt(job.method, job.lr, job.seed, job.steps, checkpoints, job.part)


def run(
    task: Task, methods: tuple[str, ...], seeds: int, tuning: int, steps: int, short: bool = False
) -> dict[str, Any]:
    """Tune every method, then run its best rate and the equal one on the reported seeds; everything that was run."""
    tuned: list[Run] = []
    wanted = {(method, lr) for method in methods for lr in task.rates(method)[: 1 if short else None]}
    for _ in range(1 if short else 3):
        jobs = [Job(task, *key, TUNING + i, steps, "validation") for key in sorted(wanted) for i in range(tuning)]
        tuned += parallel(work, jobs, f"{task.name}: rates")
        wanted = {(method, lr) for method in methods for lr in beyond(scores(tuned, method), task.falls)}
    best = {method: best_rate(scores(tuned, method), task.falls) for method in methods}
    reported = set(best.items()) | {(method, task.equal) for method in methods if method in E1}
    jobs = [Job(task, *key, seed, steps, "test") for key in sorted(reported) for seed in range(seeds)]
    runs = parallel(work, jobs, f"{task.name}: reported seeds")
    sweeps = {method: {f"{lr:g}": round(score, 3) for lr, score in scores(tuned, method).items()} for method in methods}
    judged = verdicts(task, Results(runs, best, task.falls))
    every = {"runs": runs, "tuning": tuned, "verdicts": judged}
    return {"best_rates": best, "sweeps": sweeps} | {
        name: [asdict(one) for one in rows] for name, rows in every.items()
    }


def scores(tuned: list[Run], method: str) -> dict[float, float]:
    """Mean score on the validation part by learning rate."""
    rates = sorted({run.lr for run in tuned if run.method == method})
    return {lr: mean(run.final for run in tuned if (run.method, run.lr) == (method, lr)) for lr in rates}


def best_rate(by_rate: dict[float, float], falls: bool) -> float:
    return (min if falls else max)(by_rate, key=by_rate.__getitem__)


def beyond(by_rate: dict[float, float], falls: bool) -> list[float]:
    """The next rate, about three times further, where the best one is at an end of its sweep."""
    best, ends = best_rate(by_rate, falls), (min(by_rate), max(by_rate))
    return [float(f"{best * factor:.1g}") for end, factor in zip(ends, (0.316, 3.16), strict=True) if end == best]
