"""Rules × sites → a plan: which method each site would get, counted before anything is changed."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from graphpeft.chain import Chain, Scatter, Stack
from graphpeft.errors import MatchError, RuleError
from graphpeft.ir.layers import any_layer
from graphpeft.ir.site import Site
from graphpeft.match.find import SearchResult
from graphpeft.methods import Method
from graphpeft.planning.absence import nothing
from graphpeft.planning.outcomes import Tally, tally
from graphpeft.rules.rule import Rule, to_text
from graphpeft.show.folding import any_outside, collapse_layers, layers_text, outside_text
from graphpeft.show.sites import headings, names_text, role_text, site_dict, site_row
from graphpeft.show.view import Grid, View
from graphpeft.tracing import as_pass


@dataclass(frozen=True)
class Entry:
    """One site, its method, and the text of the rule that selects it."""

    site: Site
    method: Method
    rule: str
    scale: float | None = None
    """The chain's scale, where it is another than the method's."""

    def build(self) -> Chain:
        """The site's branch with empty tensors: as wide as the weight, and with one chain per matrix for a stack."""
        chain = self.method.chain(self.site)
        if self.scale is not None:
            chain.scale = self.scale
        if self.site.rows:
            chain = Scatter(self.site.full, self.site.rows) @ chain
        return Stack(chain, self.site.stack) if self.site.stack else chain

    def as_it_is(self, chain: Chain) -> Entry:
        """This entry with the scale that the chain has now, if that was changed."""
        with torch.device("meta"):
            built = replace(self, scale=None).build().scale
        return replace(self, scale=None if chain.scale == built else chain.scale)

    def parameters(self) -> int:
        """The number of parameters that the site's branch trains."""
        with torch.device("meta"):
            return self.build().trainable()

    def rank(self) -> int:
        """An upper bound on the rank of the site's update."""
        with torch.device("meta"):
            return self.build().rank

    def form(self) -> str:
        """The site's form: an update that depends on the base weight may require the weight form."""
        with torch.device("meta"):
            return self.site.form if self.build().has_side_path else "weight"


@dataclass(frozen=True)
class Plan(View):
    """A table of sites with their methods. Prints itself; making it changes nothing."""

    model: str
    rules: tuple[Rule, ...]
    entries: tuple[Entry, ...]
    skipped: tuple[tuple[Site, str], ...] = field(repr=False)
    """Every other site and the reason why no rule took it."""
    base: int = field(repr=False)
    """Parameters of the base model."""
    tallies: tuple[Tally, ...] = field(repr=False)
    """The outcome of each rule."""
    fold: bool = field(default=True, repr=False)
    """Whether equal layers are printed on one line."""

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def trainable(self) -> int:
        """The number of trained parameters over all sites; a tensor that sites share counts once."""
        shared: dict[str, int] = {}
        own = 0
        with torch.device("meta"):
            for entry in self.entries:
                chain = entry.build()
                common = {f.shared: sum(p.numel() for p in f.parameters()) for f in _factors(chain) if f.shared}
                shared.update(common)
                own += chain.trainable() - sum(common.values())
        return own + sum(shared.values())

    @property
    def total(self) -> int:
        """Parameters of the adapted model."""
        return self.base + self.trainable

    def blocks(self) -> Iterator[Grid | str]:
        cells = [(self._cells(e), e.site.layer if self.fold else None) for e in self.entries]
        lines = collapse_layers(cells) if self.fold else [(one, [layer]) for one, layer in cells]
        rows = [(*one, layers_text(layers) if len(layers) > 1 else "") for one, layers in lines]
        columns = (*headings(*SITE), "method", "form", "rank", "parameters", "source", "")
        yield Grid.of(columns, rows, f"{self.model}: {to_text(self.rules)}", right=["rank", "parameters"])
        share = 100 * self.trainable / max(self.total, 1)
        yield f"{len(self)} sites, {self.trainable:,} trainable of {self.total:,} parameters ({share:.3f} %)"
        yield Grid.of(COUNTS, [(each.rule, *each.counts) for each in self.tallies], right=COUNTS[1:])
        yield from (f"rejected `{each.rule}`, {miss}" for each in self.tallies for miss in each.rejected)
        yield from (f"missed `{each.rule}`, {miss}" for each in self.tallies for miss in each.missed)
        yield from self._skipped_lines()

    def warn(self) -> None:
        """Warn about layers that a rule misses, though it takes equal ones."""
        for each in self.tallies:
            for miss in each.missed:
                warnings.warn(
                    f"`{each.rule}`: {miss}, so it stays without an adapter. Usually the layer was wrapped or parametrized. "
                    f"gp.plan(model, rules) lists every site; [layers=...] says which layers are meant.",
                    stacklevel=6,
                )

    def _cells(self, entry: Entry) -> tuple[str, ...]:
        row = site_row(entry.site)
        if self.fold and self._repeated[any_layer(row.weight), entry.site.role] > 1:
            row = row._replace(weight=any_layer(row.weight))
        about = (*row.cells(*SITE), str(entry.method), entry.form())
        return (*about, str(entry.rank()), f"{entry.parameters():,}", row.source)

    @cached_property
    def _repeated(self) -> Counter[tuple[str, str]]:
        return Counter((any_layer(names_text(e.site)), e.site.role) for e in self.entries)

    def _skipped_lines(self) -> list[str]:
        found = collapse_layers(((role_text(site), any_outside(reason)), site.layer) for site, reason in self.skipped)
        return [f"skipped {len(n)} × {role}: {outside_text(reason, n)}" for (role, reason), n in found]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for `json.dumps`."""
        sites = [
            {
                **site_dict(e.site),
                "method": str(e.method),
                "rule": e.rule,
                "form": e.form(),
                "rank": e.rank(),
                "parameters": e.parameters(),
            }
            for e in self.entries
        ]
        skipped = [{**site_dict(site), "reason": reason} for site, reason in self.skipped]
        counts = [
            dict(zip(COUNTS, (each.rule, *each.counts), strict=True)) | {"notes": each.notes} for each in self.tallies
        ]
        told = {"model": self.model, "rules": to_text(self.rules), "trainable": self.trainable, "total": self.total}
        return {**told, "by_rule": counts, "sites": sites, "skipped": skipped}


SITE = ("role", "weight", "rows", "size")
COUNTS = ("rule", "matched", "skipped", "rejected")
"""For each rule: sites that it takes, sites that it names but leaves out, and roles that a search only came near."""


def _factors(chain: Chain) -> list[Scatter]:
    return list(chain.factors)  # type: ignore[arg-type]


@as_pass("plan", "match rules to sites")
def make_plan(
    model: nn.Module, found: SearchResult, rules: Sequence[Rule], expect: int | None = None, fold: bool = True
) -> Plan:
    """Give every site to the one rule that selects it.

    Raises `MatchError` when a rule selects nothing (with the nearest miss and what to try) or when the number of
    sites is not `expect`, and `RuleError` when two rules select the same site.
    """
    entries: list[Entry] = []
    skipped: list[tuple[Site, str]] = []
    used: Counter[int] = Counter()
    for site in found.sites:
        takers = [i for i, rule in enumerate(rules) if rule.selects(site) is None]
        if len(takers) > 1:
            raise RuleError(
                f"{site.weight} ({site.role}) is selected by two rules: `{rules[takers[0]]}` and `{rules[takers[1]]}`. "
                f"A site gets one method. Narrow one of them, for example with [layers=...] or single roles."
            )
        if takers:
            used[takers[0]] += 1
            entries.append(Entry(site, rules[takers[0]].method, str(rules[takers[0]])))
        else:
            skipped.append((site, _reason(site, rules)))
    for i, rule in enumerate(rules):
        if not used[i]:
            raise MatchError(nothing(model, found, rule))
    if expect is not None and len(entries) != expect:
        raise MatchError(
            f"`{to_text(rules)}` selects {len(entries)} sites of {type(model).__name__}, expected {expect}. "
            f"Print gp.plan(model, rules) to see them, and adjust the rule or the number."
        )
    base = sum(p.numel() for p in model.parameters())
    return Plan(
        type(model).__name__, tuple(rules), tuple(entries), tuple(skipped), base, tally(model, found, rules), fold
    )


def _reason(site: Site, rules: Sequence[Rule]) -> str:
    """Why no rule took a site: the qualifier that excludes it, or else that no rule names its role."""
    close = [r.selects(site) for r in rules if any(r.names(p) for p in (site, *site.tied))]
    return next(
        (r for r in close if r), "no rule names this role" if site.role != "other" else "a projection without a role"
    )
