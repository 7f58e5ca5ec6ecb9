"""Alternatives to a rule that selects nothing: similar rules that do select sites."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from difflib import get_close_matches

from graphpeft.ir.layers import any_layer
from graphpeft.match.find import SearchResult
from graphpeft.match.registry import ALIASES, LETTERS, declarations
from graphpeft.rules.rule import Rule, parse


def suggestions(found: SearchResult, rule: Rule, most: int = 2) -> list[str]:
    """Rules similar to `rule` that do select sites, the nearest first."""
    method = rule.method.text(rule.options)
    good: list[str] = []
    for target in _targets(found, rule):
        (candidate,) = parse(f"{target}:{method}")
        if len(good) < most and str(candidate) not in good and any(candidate.selects(s) is None for s in found.sites):
            good.append(str(candidate))
    return good


def _targets(found: SearchResult, rule: Rule) -> Iterator[str]:
    """Targets to try: without the qualifiers, or with the nearest path; otherwise other roles of the same declarations,
    then those of a block, then weights without a role."""
    if rule.glob is not None:
        yield rule.target
        yield from (f"path({path})" for path in alike(rule.glob, found)[:1])
        return
    present = roles_present(found)
    if asked := tuple(role for role in rule.roles if role in present):
        yield from _joined(asked)
        return
    bases = {plain(role) for role in rule.roles}
    for declaration in declarations():
        if bases & set(declaration.roles):
            yield from _joined(r for r in present if plain(r) in declaration.roles)
    for alias in ("attn", "mixer", "mlp", "experts"):
        yield from _joined(role for role in ALIASES[alias] if role in present)
    stems = Counter(_ending(s.weight) for s in found.sites if s.role == "other")
    for stem, _ in stems.most_common(1):
        yield from (f"path(*.{stem})", f"path({stem})")
    yield from (role for role in ("conv", "head", "embed") if role in present)


def _joined(roles: Iterable[str]) -> Iterator[str]:
    """These roles as one target, by their alias if there is one: `mlp`, `qv`, `up+down`."""
    given = tuple(roles)
    alias = next((a for a, opened in ALIASES.items() if set(opened) == set(given)), None)
    if given:
        yield alias or ("" if set(given) <= LETTERS else "+").join(given)


def alike(glob: str, found: SearchResult) -> list[str]:
    """Up to three weights whose module names are nearest to the end of a glob, with the layer's number as `*`."""
    called: dict[str, str] = {}
    for site in found.sites:
        called.setdefault(_ending(site.weight), any_layer(site.weight))
    return [called[end] for end in get_close_matches(_ending(glob), called, n=3, cutoff=0.0)]


def _ending(path: str) -> str:
    return path.removesuffix(".weight").rpartition(".")[2]


def roles_present(found: SearchResult) -> tuple[str, ...]:
    """The roles that some site has, including those of tied weights, in graph order."""
    return tuple(dict.fromkeys(p.role for s in found.sites for p in (s, *s.tied) if p.role != "other"))


def plain(role: str) -> str:
    """The declared role: the role without the prefix `experts.` of stacked projections."""
    return role.removeprefix("experts.")
