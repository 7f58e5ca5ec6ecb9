"""E5, written before the reported seeds were run: when B-LoRA counts as finding ranks and precisions with fewer bit operations.

Bit operations are those of the adapters alone, as evaluation decides the gates, relative to all gates open. Accuracies
are of the compacted model on the test part, in points, paired by seed.
"""

from __future__ import annotations

from itertools import pairwise
from statistics import mean
from typing import Any

from paired import Verdict, difference

Runs = list[dict[str, Any]]
SAVED, LOST = 0.5, 2.0
"""Half of the bit operations, for no more than two points of mean accuracy."""


def by_seed(runs: Runs, lam: float | None, what: str = "accuracy") -> dict[int, float]:
    return {run["seed"]: run[what] for run in runs if run["lam"] == lam}


def share(runs: Runs, lam: float) -> float:
    """Mean share of the adapters' bit operations that is left."""
    return mean(run["share"]["adapters"] for run in runs if run["lam"] == lam)


def lambdas(runs: Runs) -> list[float]:
    return sorted({run["lam"] for run in runs} - {None})


def saves(runs: Runs) -> Verdict:
    """Some λ saves half, and loses at most two points against plain LoRA and against λ = 0."""
    found = []
    for lam in lambdas(runs):
        losses = [difference(by_seed(runs, lam), by_seed(runs, other), digits=1) for other in (None, 0.0)]
        if share(runs, lam) <= 1 - SAVED and all(loss.mean >= -LOST for loss in losses):
            found.append((lam, losses))
    claim = f"some λ saves {SAVED:.0%} of the adapters' bit operations for at most {LOST:g} points"
    if not found:
        return Verdict(claim, False, "none does")
    lam, (lora, open_) = min(found, key=lambda pair: share(runs, pair[0]))
    return Verdict(
        claim, True, f"λ = {lam:g} leaves {share(runs, lam):.0%}: {lora} points against LoRA, {open_} against λ = 0"
    )


def falls(runs: Runs) -> Verdict:
    """The larger λ, the fewer bit operations, in the mean over seeds."""
    shares = [share(runs, lam) for lam in lambdas(runs)]
    return Verdict(
        "bit operations fall monotonically with λ",
        all(one > other for one, other in pairwise(shares)),
        ", ".join(f"{100 * one:.3g} %" for one in shares)
        + f" for λ = {', '.join(f'{lam:g}' for lam in lambdas(runs))}",
    )


def verdicts(runs: Runs) -> list[Verdict]:
    """The claim is reproduced if both hold."""
    return [saves(runs), falls(runs)]
