"""What counts as reproduced, written down before the runs. Each criterion is a claim, a test, and what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

from byte_lm import Run

EQUAL_LR = 3e-3
"""The small learning rate at which OLoRA's claim is tested as papers test it: one rate for all."""


@dataclass(frozen=True)
class Verdict:
    claim: str
    holds: bool
    figures: str


class Results:
    """Runs of the reported seeds, by method and learning rate; `best` by the rates that the tuning seeds chose."""

    def __init__(self, runs: list[Run], best: dict[str, float]) -> None:
        self.best = best
        self.runs = {(r.method, r.lr, r.seed): r for r in runs}

    def of(self, method: str, lr: float | None = None) -> list[Run]:
        rate = self.best[method] if lr is None else lr
        return [run for (name, used, _), run in sorted(self.runs.items()) if (name, used) == (method, rate)]

    def gain(self, method: str) -> list[float]:
        """Bits per byte won over the base, per seed, at the method's best rate."""
        return [run.curve[0] - run.final for run in self.of(method)]


def paired(one: list[float], other: list[float]) -> tuple[float, float]:
    """Mean difference of paired seeds and its standard error."""
    differences = [a - b for a, b in zip(one, other, strict=True)]
    return mean(differences), stdev(differences) / sqrt(len(differences))


def olora_is_faster(results: Results) -> Verdict:
    """E1: at one small rate OLoRA is ahead of LoRA after a sixth of the steps, by two standard errors."""
    early = min(step for step in results.of("lora(r=8)", EQUAL_LR)[0].curve if step)
    values = [[run.curve[early] for run in results.of(m, EQUAL_LR)] for m in ("lora(r=8)", "olora(r=8)")]
    ahead, error = paired(*values)
    return Verdict(
        f"OLoRA converges faster than LoRA at one small learning rate ({EQUAL_LR:g})", ahead > 2 * error,
        f"{ahead:+.3f} ± {error:.3f} bits per byte ahead after {early} steps",
    )  # fmt: skip


def olora_is_better_tuned(results: Results) -> Verdict:
    """E1: the same at each method's best rate, at the end."""
    ahead, error = paired(results.gain("olora(r=8)"), results.gain("lora(r=8)"))
    return Verdict(
        "OLoRA ends better than LoRA, each at its best learning rate", ahead > 2 * error,
        f"{ahead:+.3f} ± {error:.3f} bits per byte",
    )  # fmt: skip


def melora_has_more_rank(results: Results) -> Verdict:
    """E2: with a LoRA of rank 1's parameters, every trained update has rank n."""
    one, many = results.of("lora(r=1)")[0], results.of("melora(n=8, r=1)")[0]
    holds = one.trained == many.trained and set(one.ranks) == {1} and set(many.ranks) == {8}
    return Verdict(
        "MELoRA has n times the rank at equal parameters", holds,
        f"ranks {sorted(set(one.ranks))} and {sorted(set(many.ranks))} with {one.trained:,} and {many.trained:,} parameters",
    )  # fmt: skip


def melora_is_better(results: Results) -> Verdict:
    """E2: its quality against LoRA of equal parameters."""
    ahead, error = paired(results.gain("melora(n=8, r=1)"), results.gain("lora(r=1)"))
    return Verdict(
        "MELoRA is better than LoRA at equal parameters", ahead > 2 * error, f"{ahead:+.3f} ± {error:.3f} bits per byte"
    )


def _share(method: str, needed: float, parameters: float) -> Callable[[Results], Verdict]:
    def test(results: Results) -> Verdict:
        full = results.gain("lora(r=8)")
        shares = [gain / whole for gain, whole in zip(results.gain(method), full, strict=True)]
        ratio = results.of(method)[0].trained / results.of("lora(r=8)")[0].trained
        return Verdict(
            f"{method}: ≥ {needed:.0%} of what LoRA r=8 gains with ≤ {parameters:.2f} of its parameters",
            mean(shares) >= needed and ratio <= parameters,
            f"{mean(shares):.0%} ± {stdev(shares) / sqrt(len(shares)):.0%} with {ratio:.3f} of the parameters",
        )

    return test


def rlora_is_vera(results: Results) -> Verdict:
    """E3: RLoRA, as reconstructed, within two standard errors of VeRA at equal rank."""
    ahead, error = paired(results.gain("rlora(r=64)"), results.gain("vera(r=64)"))
    return Verdict(
        "RLoRA (reconstruction) equals VeRA at r=64",
        abs(ahead) <= 2 * error,
        f"{ahead:+.3f} ± {error:.3f} bits per byte",
    )


def rlora_beats_lora_1(results: Results) -> Verdict:
    """E3, the control: LoRA r=1 has about as many parameters at this width."""
    ahead, error = paired(results.gain("rlora(r=64)"), results.gain("lora(r=1)"))
    return Verdict(
        "RLoRA r=64 is better than LoRA r=1, which has about as many parameters here", ahead > 2 * error,
        f"{ahead:+.3f} ± {error:.3f} bits per byte",
    )  # fmt: skip


CRITERIA = [
    olora_is_faster, olora_is_better_tuned, melora_has_more_rank, melora_is_better,
    _share("vera(r=64)", 0.6, 1 / 9), _share("rlora(r=64)", 0.6, 1 / 9), _share("vera(r=256)", 0.75, 1 / 4),
    rlora_is_vera, rlora_beats_lora_1,
]  # fmt: skip
