"""The declared roles: built in, installed with another package, or registered at run time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from graphpeft.errors import RuleError
from graphpeft.match.declaration import Declaration
from graphpeft.match.pattern import Pattern, Unbound
from graphpeft.match.roles import DECLARED

GROUP = "graphpeft.roles"
"""The entry point group by which a package declares roles; each entry names a `Declaration` or a list of them."""

LETTERS = frozenset("qkvo")
"""Roles whose letters a target may combine: `qv`, `qkvo`."""

ALIASES = {
    "attn": ("q", "k", "v", "o"),
    "mlp": ("gate", "up", "down"),
    "linear": ("q", "k", "v", "o", "gate", "up", "down"),
    "experts": ("experts.gate", "experts.up", "experts.down"),
    "mixer": ("mixer.in", "mixer.out"),
}

RESERVED = (*ALIASES["experts"], "other")
"""Roles that the search itself assigns: to projections in a stack, and to projections that no declaration binds."""


_REGISTERED: list[Declaration] = []


def declarations() -> tuple[Declaration, ...]:
    """Every declaration in the order of trial: those of other packages come before the built-in `rest` declarations.
    Raises `RuleError` when a package declares roles that cannot be loaded or that clash with others."""
    builtin = DECLARED
    known = {d.name: (d, "graphpeft") for d in builtin}
    outside = [*_installed(), *((d, "register()") for d in _REGISTERED)]
    for declaration, source in outside:
        check(declaration, source, known.values())
        known[declaration.name] = declaration, source
    mine = [d for d, source in known.values() if source != "graphpeft"]
    return (*(d for d in builtin if not d.rest), *mine, *(d for d in builtin if d.rest))


def roles() -> tuple[str, ...]:
    """Every role that some declaration binds, and the roles of stacked weights."""
    named = [role for declaration in declarations() for role in declaration.roles]
    return tuple(dict.fromkeys([*named, *ALIASES["experts"]]))


def register(declaration: Declaration) -> None:
    """Declare roles for this process: from now on rules accept them and every search looks for them.

    Registering the same declaration again changes nothing. Raises `RuleError` for a name or a role that exists already,
    for a role that rules would read as something else, and for a pattern that binds names missing from
    `declaration.roles`.
    """
    check(declaration, "register()", [*((d, "graphpeft") for d in DECLARED), *((d, "register()") for d in _REGISTERED)])
    if declaration not in _REGISTERED:
        _REGISTERED.append(declaration)


def opened(word: str) -> tuple[str, ...]:
    """The roles that one word of a target means: an alias, a run of the letters q k v o, or a role."""
    return ALIASES.get(word, tuple(word) if set(word) <= LETTERS else (word,))


def check(declaration: Declaration, source: str, known: Iterable[tuple[Declaration, str]]) -> None:
    """Raise `RuleError` unless the declaration from `source` is compatible with the `known` ones."""
    if not isinstance(declaration, Declaration):
        raise RuleError(f"{source} gives a {type(declaration).__name__}, which declares no role. Give a Declaration.")
    about = f"The declaration {declaration.name!r} from {source}"
    for other, place in known:
        if declaration == other and place != "graphpeft":
            continue
        if declaration.name == other.name:
            raise RuleError(f"{about} has the name of another, from {place}. Choose another name.")
        if shared := [role for role in declaration.roles if role in other.roles]:
            raise RuleError(
                f"{about} binds the role {shared[0]!r}, which {other.name!r} from {place} declares. "
                f"A role has one declaration: choose another role name, such as 'my.{shared[0]}'."
            )
    for role in declaration.roles:
        check_name(role)
        if role in RESERVED:
            raise RuleError(f"{about} binds {role!r}, which graphpeft itself assigns. Choose another role name.")
    if unlisted := set(bound(declaration.pattern)) - set(declaration.roles):
        raise RuleError(
            f"{about} lists the roles {', '.join(declaration.roles) or 'none'}, but its pattern binds "
            f"{', '.join(sorted(unlisted))} too. List every name that the pattern gives to affine or lookup."
        )


def check_name(role: str) -> None:
    """Raise `RuleError` for a role that rules cannot name, or would read as something else."""
    if opened(role) != (role,):
        raise RuleError(f"A role cannot be called {role!r}: rules read that as {' + '.join(opened(role))}.")
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", role, re.ASCII):
        raise RuleError(f"A role cannot be called {role!r}: it is a word, or words joined by dots, such as 'my.gate'.")


def bound(pattern: Pattern) -> Iterator[str]:
    """The names that a pattern may bind, if its parts are fields of dataclasses."""
    if isinstance(pattern, Unbound):
        return
    parts: dict[str, Any] = {f.name: getattr(pattern, f.name) for f in fields(pattern)} if is_dataclass(pattern) else {}
    if "name" in parts:
        yield parts["name"]
    for value in parts.values():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Pattern):
                yield from bound(part)


@cache
def _installed() -> tuple[tuple[Declaration, str], ...]:
    """The declarations of installed packages, each with a text that names its source; loaded once."""
    found = []
    for entry in entry_points(group=GROUP):
        source = f"{entry.dist.name if entry.dist else 'an unknown package'} (entry point {entry.name} = {entry.value})"
        loaded = _load(entry, source)
        found += [(d, source) for d in (loaded if isinstance(loaded, (list, tuple)) else [loaded])]
    return tuple(found)


def _load(entry: EntryPoint, source: str) -> Any:
    try:
        return entry.load()
    except Exception as error:
        raise RuleError(
            f"The roles of {source} cannot be loaded: {type(error).__name__}: {error}. Usually the package is broken or "
            f"made for another version. Repair it, or uninstall {entry.dist.name if entry.dist else 'it'}."
        ) from error
