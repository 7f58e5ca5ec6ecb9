"""E1 to E3: what counts as reproduced, written down before the runs. Each criterion is a claim, a test, and what was measured.

The criteria of the language model were written first; digits and docstrings take the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from paired import Difference, Verdict, difference, summary
from run_record import Run

if TYPE_CHECKING:
    from adapting import Task


class Results:
    """Runs of the reported seeds, by method and learning rate; `best` by the rates that the tuning seeds chose."""

    def __init__(self, runs: list[Run], best: dict[str, float], falls: bool = True) -> None:
        self.best, self.sign = best, -1 if falls else 1
        self.runs = {(r.method, r.lr, r.seed): r for r in runs}

    def of(self, method: str, lr: float | None = None) -> dict[int, Run]:
        """By seed."""
        key = (method, self.best[method] if lr is None else lr)
        return {seed: run for (*found, seed), run in sorted(self.runs.items()) if tuple(found) == key}

    def gain(self, method: str, lr: float | None = None, at: int | None = None) -> dict[int, float]:
        """What was won over the base by seed, at the end or after `at` steps."""
        runs = self.of(method, lr).items()
        return {s: self.sign * (run.curve[at or max(run.curve)] - run.curve[0]) for s, run in runs}

    def ahead(self, one: str, other: str, lr: float | None = None, at: int | None = None) -> Difference:
        return difference(self.gain(one, lr, at), self.gain(other, lr, at))

    def first(self, method: str) -> Run:
        return next(iter(self.of(method).values()))


Criterion = Callable[["Task", Results], Verdict]


def olora_is_faster(task: Task, results: Results) -> Verdict:
    """E1: at one small rate OLoRA is ahead of LoRA after a sixth of the steps, by two standard errors."""
    early = min(step for step in results.of("lora(r=8)", task.equal)[0].curve if step)
    ahead = results.ahead("olora(r=8)", "lora(r=8)", task.equal, early)
    claim = "OLoRA converges faster than LoRA at one small learning rate"
    return Verdict(claim, ahead.above, f"{ahead} {task.unit} after {early} steps at {task.equal:g}")


def melora_has_more_rank(task: Task, results: Results) -> Verdict:
    """E2: with a LoRA of rank 1's parameters, every trained update has rank n."""
    one, many = results.first("lora(r=1)"), results.first("melora(n=8, r=1)")
    return Verdict(
        "MELoRA has n times the rank at equal parameters",
        one.trained == many.trained and set(one.ranks) == {1} and set(many.ranks) == {8},
        f"ranks {sorted(set(many.ranks))} and {sorted(set(one.ranks))} with {one.trained:,} parameters",
    )


def better(one: str, other: str, claim: str) -> Criterion:
    """At the end and each at its best rate, by two standard errors."""

    def test(task: Task, results: Results) -> Verdict:
        ahead = results.ahead(one, other)
        return Verdict(claim, ahead.above, f"{ahead} {task.unit}")

    test.needs = (one, other)  # type: ignore[attr-defined]
    return test


def share(method: str, needed: float, parameters: float) -> Criterion:
    """E3: some part of what LoRA r=8 gains with few of its parameters."""

    def test(task: Task, results: Results) -> Verdict:
        full, gained = results.gain("lora(r=8)"), results.gain(method)
        parts = summary([100 * gained[seed] / full[seed] for seed in full], digits=0)
        ratio = results.first(method).trained / results.first("lora(r=8)").trained
        return Verdict(
            f"{method}: ≥ {needed:.0%} of what LoRA r=8 gains with ≤ {parameters:.2f} of its parameters",
            parts.mean >= 100 * needed and ratio <= parameters,
            f"{parts} % with {ratio:.3f} of the parameters".lstrip("+"),
        )

    test.needs = (method, "lora(r=8)")  # type: ignore[attr-defined]
    return test


def rlora_is_vera(task: Task, results: Results) -> Verdict:
    """E3: RLoRA, as reconstructed, within two standard errors of VeRA at equal rank."""
    ahead = results.ahead("rlora(r=64)", "vera(r=64)")
    claim = "RLoRA (reconstruction) equals VeRA at r=64"
    return Verdict(claim, not (ahead.above or ahead.below), f"{ahead} {task.unit}")


olora_is_faster.needs = ("olora(r=8)", "lora(r=8)")  # type: ignore[attr-defined]
melora_has_more_rank.needs = ("melora(n=8, r=1)", "lora(r=1)")  # type: ignore[attr-defined]
rlora_is_vera.needs = ("rlora(r=64)", "vera(r=64)")  # type: ignore[attr-defined]
CRITERIA: tuple[Criterion, ...] = (
    olora_is_faster,
    better("olora(r=8)", "lora(r=8)", "OLoRA ends better than LoRA, each at its best learning rate"),
    melora_has_more_rank,
    better("melora(n=8, r=1)", "lora(r=1)", "MELoRA is better than LoRA at equal parameters"),
    share("vera(r=64)", 0.6, 1 / 9),
    share("vera(r=256)", 0.75, 1 / 4),
    share("rlora(r=64)", 0.6, 1 / 9),
    rlora_is_vera,
    better("rlora(r=64)", "lora(r=1)", "RLoRA r=64 is better than LoRA r=1, the control of about its size here"),
)


def verdicts(task: Task, results: Results) -> list[Verdict]:
    """Of the criteria whose methods were run."""
    return [test(task, results) for test in CRITERIA if set(test.needs) <= results.best.keys()]  # type: ignore[attr-defined]
