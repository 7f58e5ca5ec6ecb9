"""Differences between runs of equal seeds, the verdict on a claim, and how both are printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev


@dataclass(frozen=True)
class Verdict:
    claim: str
    holds: bool
    figures: str


@dataclass(frozen=True)
class Difference:
    """Mean and standard error of paired differences."""

    mean: float
    error: float
    digits: int = 3

    @property
    def above(self) -> bool:
        """Above zero by two standard errors."""
        return self.mean > 2 * self.error

    @property
    def below(self) -> bool:
        return self.mean < -2 * self.error

    def __str__(self) -> str:
        return f"{self.mean:+.{self.digits}f} ± {self.error:.{self.digits}f}"


def difference(one: dict[int, float], other: dict[int, float], digits: int = 3) -> Difference:
    """`one` minus `other`, both by seed. Raises `ValueError` unless they have the same seeds."""
    if one.keys() != other.keys():
        raise ValueError(f"Seeds are not paired: {sorted(one)} and {sorted(other)}.")
    return summary([one[seed] - other[seed] for seed in sorted(one)], digits)


def summary(values: Sequence[float], digits: int = 3) -> Difference:
    return Difference(mean(values), stdev(values) / sqrt(len(values)), digits)
