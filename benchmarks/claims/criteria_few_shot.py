"""E4, written before the reported seeds were run: when the PAC-Bayes regularizer counts as helping few-shot adaptation.

Differences are in points of accuracy on the test part, paired by seed. The first criterion decides the claim. The others
say what else one would have to see to believe it: the same on other data, and less or nothing for plain LoRA.
"""

from __future__ import annotations

from typing import Any

from paired import Difference, Verdict, difference

Runs = list[dict[str, Any]]


def accuracies(runs: Runs, data: str, method: str, k: int, arm: str) -> dict[int, float]:
    """By seed."""
    key = (data, method, k, arm)
    return {r["seed"]: r["accuracy"] for r in runs if (r["data"], r["method"], r["k"], r["setting"]["arm"]) == key}


def against(runs: Runs, data: str, method: str, k: int, arm: str, other: str) -> Difference:
    return difference(accuracies(runs, data, method, k, arm), accuracies(runs, data, method, k, other), digits=1)


def helps(runs: Runs, data: str, method: str, k: int) -> Verdict:
    """PAC above no regularizer by two standard errors, and on average no worse than decay and than noise alone."""
    none, decay, noise = (against(runs, data, method, k, "pac", other) for other in ("none", "decay", "noise"))
    return Verdict(
        f"PAC helps {method} with {k} examples of each class ({data})",
        none.above and decay.mean >= 0 and noise.mean >= 0,
        f"{none} points against no regularizer, {decay} against decay, {noise} against noise alone",
    )


def verdicts(runs: Runs) -> list[Verdict]:
    """The deciding one first."""
    cells = sorted({(r["data"], r["k"]) for r in runs})
    smallest = {data: min(k for other, k in cells if other == data) for data, _ in cells}
    tried = {(r["data"], r["method"]) for r in runs}
    order = [(data, method) for method in ("rlora(r=64)", "vera(r=64)", "lora(r=4)") for data in smallest]
    return [helps(runs, data, method, smallest[data]) for data, method in order if (data, method) in tried]
