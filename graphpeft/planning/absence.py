"""Why a rule or a role has no site: how the search ended, its nearest miss, and the model's line there."""

from __future__ import annotations

import inspect
import linecache
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

import torch
from torch import nn

from graphpeft.ir.site import Site
from graphpeft.ir.source import code_of, location, runner
from graphpeft.match.declaration import Declaration
from graphpeft.match.find import SearchResult
from graphpeft.match.fused import concrete
from graphpeft.match.pattern import Miss
from graphpeft.match.products import op
from graphpeft.match.registry import declarations
from graphpeft.planning.suggest import alike, plain, roles_present, suggestions
from graphpeft.rules.rule import Rule, fits
from graphpeft.show.sites import role_text


@dataclass(frozen=True)
class Near:
    """The place where a search stopped, or (with a site) the place of a role's neighbor."""

    place: str
    """`file.py:line` of the model's code, or the node's name if the capture knows no line."""
    node: str
    """The operator, and the shape of its result."""
    code: str
    """The line of code itself; empty if its file cannot be read."""
    reason: str

    def __str__(self) -> str:
        shown = "   ".join(filter(None, (self.node, self.code)))
        return f"at {self.place}: {self.reason}" + (f"\n      {shown}" if shown else "")


@dataclass(frozen=True)
class Absence:
    """Why roles of one declaration have no site. Prints as a sentence, with the nearest place below it."""

    roles: tuple[str, ...]
    outcome: Literal["no match", "condition failed", "matched without it", "undeclared"]
    reason: str
    near: Near | None = None

    def __str__(self) -> str:
        found = "matched" if self.outcome == "matched without it" else "nearest miss"
        near = f"; {found} {self.near}" if self.near else ""
        return f"{', '.join(self.roles)}: {self.outcome}: {self.reason}{near}"


def absences(model: nn.Module, found: SearchResult, roles: Iterable[str]) -> tuple[Absence, ...]:
    """Why each of these roles without a site has none; roles with the same reason share an entry."""
    present = roles_present(found)
    declared = {role: d for d in declarations() for role in d.roles}
    grouped: dict[tuple[str, bool], list[str]] = {}
    for role in (role for role in roles if role not in present):
        declaration = declared.get(plain(role))
        stacked = role != plain(role) and declaration is not None and bool(_beside(found, declaration))
        grouped.setdefault((declaration.name if declaration else role, stacked), []).append(role)
    return tuple(
        _absence(model, found, tuple(missing), declared.get(plain(missing[0])), stacked)
        for (_, stacked), missing in grouped.items()
    )


def _beside(found: SearchResult, declaration: Declaration) -> list[Site]:
    """The sites of a declaration's roles, those of stacked weights included."""
    return [s for s in found.sites if plain(s.role) in declaration.roles]


def _absence(
    model: nn.Module, found: SearchResult, missing: tuple[str, ...], declaration: Declaration | None, stacked: bool
) -> Absence:
    if declaration is None:
        return Absence(missing, "undeclared", "no pattern declares it")
    beside = _beside(found, declaration)
    names = tuple(dict.fromkeys(s.role for s in beside))
    if stacked:
        return Absence(missing, "no match", f"{_and(names)} are no stacks of matrices, one for each expert")
    if beside:
        reason = f"its {declaration.name} has {_and(names)} but no {_and(missing, 'or')}"
        return Absence(missing, "matched without it", reason, _seen(model, beside[0]))
    miss = found.misses.get(declaration.name)
    if miss is None or not miss.depth:
        return Absence(missing, "no match", f"{declaration.absent}, and nothing in the graph comes near")
    outcome: Literal["no match", "condition failed"] = "condition failed" if miss.failed else "no match"
    return Absence(missing, outcome, declaration.absent, _near(model, miss))


def nothing(model: nn.Module, found: SearchResult, rule: Rule) -> str:
    """The message for a rule that selects no site: the reason, the nearest miss, and rules that do select sites."""
    name = type(model).__name__
    if rule.glob is not None and not any(rule.names(p) for s in found.sites for p in (s, *s.tied)):
        return _no_path(model, found, rule)
    present = Counter(role_text(s) for s in found.sites)
    asked = [s for s in found.sites if rule.selects(s) and Rule(rule.target, rule.method).selects(s) is None]
    if asked:
        have, reasons = Counter(map(role_text, asked)), Counter(str(rule.selects(s)) for s in asked)
        but = "; ".join(f"{n} × {why}" for why, n in reasons.items())
        told = f"it has {_counted(have)}, but {but}. Widen the qualifiers in [...]."
        return f"`{rule}` matches no site of {name}: {told}{_try(found, rule)}"
    why = "\n  ".join(map(str, absences(model, found, rule.roles)))
    graph = f"The graph has {_counted(present) or 'no projections at all'}."
    lines = [f"`{rule}` matches no site of {name}.", why, *_unseen(found), graph + _try(found, rule)]
    return "\n  ".join(lines)


def _no_path(model: nn.Module, found: SearchResult, rule: Rule) -> str:
    assert rule.glob is not None
    near = alike(rule.glob, found)
    meant = [n for n, _ in model.named_parameters() if fits(rule.glob, n)]
    unlike = f"; {meant[0]} is no projection that the graph uses" if meant else ""
    return (
        f"`{rule}` matches no projection of {type(model).__name__}{unlike}. It has {', '.join(near) or 'none'}. "
        f"Adjust the glob.{_try(found, rule)}"
    )


def _try(found: SearchResult, rule: Rule) -> str:
    rules = suggestions(found, rule)
    said = f" Try {' or '.join(f'`{text}`' for text in rules)}." if rules else ""
    return f"{said} gp.sites(model) lists every projection."


def _unseen(found: SearchResult) -> list[str]:
    """One line for each part of the model that was not captured."""
    return [f"not seen: {path or 'the whole model'}: {_first(why)}" for path, why in found.unreached.items()]


def _first(text: str) -> str:
    return text.strip().splitlines()[0]


def _and(words: Iterable[str], last: str = "and") -> str:
    *many, one = words
    return f"{', '.join(many)} {last} {one}" if many else one


def _counted(roles: Counter[str]) -> str:
    return ", ".join(f"{role} × {n}" for role, n in roles.items())


# Places


def _near(model: nn.Module, miss: Miss) -> Near:
    node = miss.node
    owner = runner(node, model)
    shape = getattr(node.meta.get("val"), "shape", None)
    kind = "an input" if node.op == "placeholder" else op(node)
    size = f" {concrete(shape)}" if isinstance(shape, torch.Size) else ""
    return Near(location(node, owner) or node.name, kind + size, code_of(node, owner), miss.reason)


def _seen(model: nn.Module, site: Site) -> Near | None:
    """The place of a missing role's neighbor; `None` if the capture knows no line."""
    files = {inspect.getsourcefile(type(m)) or "" for m in model.modules() if type(m).__module__ != "builtins"}
    code = line_of(site.source, files)
    return Near(site.source, "", code, f"{site.role} is {site.weight}") if site.source else None


def line_of(place: str, files: Iterable[str]) -> str:
    """The code at `file.py:line`, read from whichever of the files has that name; empty if none has."""
    name, _, number = place.rpartition(":")
    path = next((f for f in files if PurePath(f).name == name), "")
    return linecache.getline(path, int(number)).strip() if path and number.isdecimal() else ""
