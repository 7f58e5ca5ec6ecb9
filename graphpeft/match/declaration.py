"""`Declaration`: a pattern, and the roles that it binds."""

from __future__ import annotations

from dataclasses import dataclass

from graphpeft.match.pattern import Pattern


@dataclass(frozen=True)
class Declaration:
    """A pattern and the roles that it binds. `absent` says in words what is missing if the pattern matches nowhere."""

    name: str
    pattern: Pattern
    roles: tuple[str, ...]
    absent: str
    at: frozenset[str] | None = None
    """The operators at which the pattern is tried; `None` for every node where flow stops (see `Dataflow.barrier`)."""
    rest: bool = False
    """Whether it binds only projections that no earlier declaration has bound."""
