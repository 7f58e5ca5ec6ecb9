"""The outcome of each rule: sites that it takes, sites that it leaves out, and searches that came near."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from graphpeft.match.find import SearchResult
from graphpeft.planning.absence import Absence, absences
from graphpeft.rules.rule import Rule
from graphpeft.show.folding import any_outside


@dataclass(frozen=True)
class Tally:
    """One rule's outcome."""

    rule: str
    matched: int
    skipped: tuple[tuple[str, int], ...]
    """Why sites that the target names were left out, and how many."""
    rejected: tuple[Absence, ...]
    """Roles of the target without a site, if a search came near one."""

    @property
    def notes(self) -> list[str]:
        return [f"{count} × {reason}" for reason, count in self.skipped] + [str(each) for each in self.rejected]

    @property
    def counts(self) -> tuple[int, int, int]:
        """Sites matched, sites skipped, roles rejected."""
        return self.matched, sum(count for _, count in self.skipped), sum(len(each.roles) for each in self.rejected)


def tally(model: nn.Module, found: SearchResult, rules: Sequence[Rule]) -> tuple[Tally, ...]:
    """One `Tally` for each rule, in the order of the rules."""
    made = []
    for rule in rules:
        named = [site for site in found.sites if any(rule.names(place) for place in (site, *site.tied))]
        reasons = [rule.selects(site) for site in named]
        skipped = Counter(any_outside(reason) for reason in reasons if reason is not None)
        near = [each for each in absences(model, found, rule.roles) if each.near is not None]
        made.append(Tally(str(rule), reasons.count(None), tuple(skipped.items()), tuple(near)))
    return tuple(made)
