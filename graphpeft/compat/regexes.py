"""The syntax tree of a regular expression. Python's parser of regular expressions is private to `re`."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")


@dataclass(frozen=True, eq=False)
class Char:
    """One character."""

    fits: Callable[[str], bool]
    wide: bool = False
    """Whether `re` goes through very many characters when it compiles this."""


@dataclass(frozen=True, eq=False)
class Spot:
    """A place between characters, such as `^` or a word boundary, in a text."""

    fits: Callable[[str, int], bool]


@dataclass(frozen=True, eq=False)
class Run:
    parts: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class Either:
    branches: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class Repeat:
    least: int
    most: int
    body: Node


@dataclass(frozen=True, eq=False)
class Look:
    """A look ahead, or `behind` by a number of characters."""

    body: Node
    wanted: bool
    behind: int | None


@dataclass(frozen=True, eq=False)
class Odd:
    """A construct whose matches depend on more than the text and the place, such as a backreference."""

    body: Node


Node = Char | Spot | Run | Either | Repeat | Look | Odd
SPOTS = {
    "AT_BEGINNING": "^", "AT_BEGINNING_STRING": r"\A", "AT_END": "$", "AT_END_STRING": r"\Z",
    "AT_BOUNDARY": r"\b", "AT_NON_BOUNDARY": r"\B",
}  # fmt: skip
CATEGORIES = {
    "CATEGORY_DIGIT": r"\d", "CATEGORY_NOT_DIGIT": r"\D", "CATEGORY_SPACE": r"\s", "CATEGORY_NOT_SPACE": r"\S",
    "CATEGORY_WORD": r"\w", "CATEGORY_NOT_WORD": r"\W",
}  # fmt: skip
EMPTY = Run(())
WIDE = 1000
"""A range of more characters than this is wide."""


def parse(pattern: str) -> Node:
    """The tree of a pattern. Raises `re.error`, and `RecursionError` for deep nesting, as `re.compile` does."""
    tree = _parser.parse(pattern)
    return _run(tree, tree.state.flags)


def _run(items: Any, flags: int) -> Node:
    parts = tuple(_node(item[0].name, item[1], flags) for item in items)
    return parts[0] if len(parts) == 1 else Run(parts)


def _node(name: str, about: Any, flags: int) -> Node:
    if name == "SUBPATTERN":
        _, added, removed, body = about
        return _run(body, (flags | added) & ~removed)
    if name == "BRANCH":
        return Either(tuple(_run(each, flags) for each in about[1]))
    if name in ("MAX_REPEAT", "MIN_REPEAT"):
        return Repeat(int(about[0]), int(about[1]), _run(about[2], flags))
    if name in ("ASSERT", "ASSERT_NOT"):
        direction, body = about
        return Look(_run(body, flags), name == "ASSERT", int(body.getwidth()[0]) if direction < 0 else None)
    if name == "FAILURE":
        return Look(EMPTY, False, None)
    if name == "AT":
        at = re.compile(SPOTS[about.name], flags & re.MULTILINE)
        return Spot(lambda text, place: at.match(text, place) is not None)
    if name in ("ATOMIC_GROUP", "POSSESSIVE_REPEAT", "GROUPREF", "GROUPREF_EXISTS"):
        return Odd(_odd(name, about, flags))
    wide = name == "IN" and flags & re.IGNORECASE and any(_width(*item) > WIDE for item in about)
    return Char(_char(name, about, flags), bool(wide))


def _width(op: Any, about: Any) -> int:
    return int(about[1] - about[0]) if op.name == "RANGE" else 0


def _odd(name: str, about: Any, flags: int) -> Node:
    """What such a construct may match at most."""
    if name == "ATOMIC_GROUP":
        return _run(about, flags)
    if name == "POSSESSIVE_REPEAT":
        return Repeat(int(about[0]), int(about[1]), _run(about[2], flags))
    if name == "GROUPREF_EXISTS":
        return Either(tuple(_run(each, flags) for each in about[1:] if each is not None))
    return EMPTY


def _char(name: str, about: Any, flags: int) -> Callable[[str], bool]:
    if name == "ANY":
        return lambda char: bool(flags & re.DOTALL) or char != "\n"
    if name == "NOT_LITERAL":
        same = _char("LITERAL", about, flags)
        return lambda char: not same(char)
    if name == "CATEGORY":
        kind = re.compile(CATEGORIES[about.name], flags & re.ASCII)
        return lambda char: kind.match(char) is not None
    if name == "IN":
        # `[^...]` has a first item of this name.
        negated = about[0][0].name == "NEGATE"
        items = [_char(item[0].name, item[1], flags) for item in about[negated:]]
        return lambda char: any(fits(char) for fits in items) != negated
    low, high = about if name == "RANGE" else (about, about)
    if flags & re.IGNORECASE:
        return lambda char: any(low <= ord(each) <= high for each in {char, *char.lower()[:1], *char.upper()[:1]})
    return lambda char: bool(low <= ord(char) <= high)
