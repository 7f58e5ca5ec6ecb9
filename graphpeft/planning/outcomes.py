"""The outcome of each rule: sites that it takes, sites that it leaves out, and searches that came near."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from graphpeft.ir.layers import any_layer_of_module
from graphpeft.ir.site import Site
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
    unlike: tuple[str, ...] = ()
    """Weights of layers like those that it takes, which are no sites: see `unlike`."""

    @property
    def notes(self) -> list[str]:
        return (
            [f"{count} × {reason}" for reason, count in self.skipped]
            + [str(each) for each in self.rejected]
            + self.missed
        )

    @property
    def missed(self) -> list[str]:
        """What to say of layers that are like those taken, and have no site."""
        more = f" (and {len(self.unlike) - 1} more)" if len(self.unlike) > 1 else ""
        return [f"{self.unlike[0]}{more} is no site, as it is in equal layers"] if self.unlike else []

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
        taken = [site for site, reason in zip(named, reasons, strict=True) if reason is None]
        near = [each for each in absences(model, found, rule.roles) if each.near is not None]
        made.append(
            Tally(str(rule), reasons.count(None), tuple(skipped.items()), tuple(near), unlike(model, found, taken))
        )
    return tuple(made)


def unlike(model: nn.Module, found: SearchResult, taken: Sequence[Site]) -> tuple[str, ...]:
    """Weights that stand where the taken ones stand in other layers, and are no sites: the layer was wrapped or parametrized,
    say, or its code is another. Layers that have no such module, as in hybrid models, are not meant."""
    paths: dict[str, list[str]] = {}
    for path, _ in model.named_modules():
        paths.setdefault(any_layer_of_module(path), []).append(path)
    known = {place.weight for site in found.sites for place in (site, *site.tied)}
    missed: dict[str, None] = {}
    for site in taken:
        holder, _, leaf = site.weight.rpartition(".")
        for path in paths.get(any_layer_of_module(holder), ()):
            weight = f"{path}.{leaf}"
            if weight not in known and site.layer is not None:
                missed[weight] = None
    return tuple(missed)
