"""`Declaration`: a pattern, and the roles that it binds."""

from __future__ import annotations

from dataclasses import dataclass

from graphpeft.match.pattern import Pattern


@dataclass(frozen=True)
class Declaration:
    """A pattern and the roles that it binds. `absent` says in words what is missing where it matches nowhere."""

    name: str
    pattern: Pattern
    roles: tuple[str, ...]
    absent: str
    at: frozenset[str] | None = None
    """The operators at which the pattern is tried; `None` for wherever flow stops (see `Dataflow.barrier`)."""
    rest: bool = False
    """Whether it is only for projections that no declaration before it has bound."""
