"""Read rule text. Every error marks its place with a caret and says what would be accepted there."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any, NoReturn, TypeVar

from lark import Lark, Token, Tree, UnexpectedInput

from graphpeft import methods
from graphpeft.errors import RuleError
from graphpeft.match import registry
from graphpeft.match.registry import ALIASES, opened
from graphpeft.methods import Method

T = TypeVar("T")
Ranges = tuple[tuple[int, int], ...]
Parts = tuple[str, Method, Ranges | None, bool | None, tuple[str, ...]]
"""Target, method, layers, cross, and the options that the text names."""

_QUALIFIERS = "layers=0-3,7, cross, self"


def path_glob(target: str) -> str | None:
    """The pattern of a `path(glob)` target."""
    match = re.fullmatch(r"path\s*\((.*)\)", target)
    return match[1].strip() if match else None


def expand(target: str) -> tuple[str, ...]:
    """The roles that a target means, with aliases and runs of q k v o expanded; none for a path."""
    if path_glob(target) is not None:
        return ()
    return tuple(role for word in target.split("+") for role in opened(word))


def read(text: str, roles: Iterable[str] = ()) -> Iterator[Parts]:
    """The parts of each rule in a text; `roles` names roles besides the declared ones. Raises `RuleError`."""
    reader = _Reader(text, tuple(dict.fromkeys((*registry.roles(), *roles))))
    seen = set()
    for node in reader.tree().children:
        parts = reader.rule(node)
        target, _, layers, cross, _ = parts
        where = (frozenset(expand(target)), path_glob(target), layers, cross)
        if where in seen:
            reader.fail(_first(node), f"The target {target} is given twice", "Keep one of the two rules.")
        seen.add(where)
        yield parts


@cache
def _parser() -> Lark:
    return Lark(files("graphpeft.rules").joinpath("rules.lark").read_text(encoding="utf-8"), parser="lalr")


class _Reader:
    def __init__(self, text: str, roles: tuple[str, ...]) -> None:
        self.text = text
        self.roles = roles
        for role in roles:
            registry.check_name(role)

    def tree(self) -> Tree[Token]:
        if not self.text.strip():
            raise RuleError("The rules are empty. Write at least one, such as 'qv:lora(r=8)'.")
        try:
            return _parser().parse(self.text)
        except UnexpectedInput as error:
            self.syntax(error)

    def rule(self, node: Any) -> Parts:
        parts = {str(part.data): part for part in node.children}
        layers, cross = self.qualifiers(parts["qualifiers"]) if "qualifiers" in parts else (None, None)
        target = self.target(parts["target"])
        method, given = self.method(parts["method"])
        return target, method, layers, cross, given

    def target(self, node: Any) -> str:
        if node.children[0].type == "PATH":
            glob = path_glob(node.children[0])
            return (
                f"path({glob})" if glob else self.fail(node.children[0], "The path is empty", "Write path(*.in_proj).")
            )
        seen: list[str] = []
        for word in node.children:
            if not set(expand(word)) <= set(self.roles):
                self.unknown(word, "target", (*self.roles, *self.aliases(), "qv", "qkv"), self.targets())
            for role in expand(word):
                if role in seen:
                    self.fail(word, f"The target names the role {role} twice", "Name each role once.")
                seen.append(role)
        return "+".join(node.children)

    def qualifiers(self, node: Any) -> tuple[Ranges | None, bool | None]:
        ranges: list[tuple[int, int]] = []
        given: list[str] = []
        for child in node.children:
            name = _first(child)
            if isinstance(child, Tree) and child.data == "range":
                if given[-1:] != ["layers"]:
                    self.fail(name, "A layer that no layers= precedes", "Write layers=0-3,7.")
                ranges.append(self.range(child))
                continue
            if name not in ("layers", "cross", "self"):
                self.unknown(name, "qualifier", ("layers", "cross", "self"), f"Qualifiers: {_QUALIFIERS}.")
            if isinstance(child, Tree) != (name == "layers"):
                self.fail(name, f"This is not how {name} is written", f"Qualifiers: {_QUALIFIERS}.")
            if name in given or {"cross", "self"} <= {name, *given}:
                self.fail(name, f"{name} repeats or contradicts what is before it", "Leave one of them out.")
            given.append(str(name))
            if isinstance(child, Tree):
                ranges.append(self.range(child.children[1]))
        return tuple(ranges) or None, "cross" in given if {"cross", "self"} & set(given) else None

    def range(self, node: Any) -> tuple[int, int]:
        first, last = int(node.children[0]), int(node.children[-1])
        if first > last:
            self.fail(node.children[0], f"The layers {first}-{last} run backwards", f"Write {last}-{first}.")
        return first, last

    def method(self, node: Any) -> tuple[Method, tuple[str, ...]]:
        name, *rest = node.children
        if name not in methods.names():
            self.unknown(name, "method", methods.names(), f"Methods: {', '.join(methods.names())}.")
        method = methods.get(name)
        options = {option.name: option for option in methods.options(method)}
        values: dict[str, Any] = {}
        for key, value in (option.children for tree in rest for option in tree.children):
            if key not in options:
                accepted = ", ".join(f"{option.name} ({option.accepts})" for option in options.values())
                self.unknown(key, f"option of {name}", tuple(options), f"Options: {accepted}.")
            if key in values:
                self.fail(key, f"The option {key} is given twice", "Leave one of them out.")
            values[str(key)] = _value(value)
            self.attempt(value, options[key].check, values[key])
        return self.attempt(name, lambda: method(**values)), tuple(values)

    def attempt(self, place: Token, action: Callable[..., T], *args: Any) -> T:
        try:
            return action(*args)
        except RuleError as error:
            self.fail(place, str(error).rstrip("."), cause=error)

    def aliases(self) -> list[str]:
        return [alias for alias, roles in ALIASES.items() if set(roles) <= set(self.roles)]

    def targets(self) -> str:
        known = ", ".join((*self.roles, *self.aliases()))
        return f"Targets: {known}, runs of q k v o such as qv, path(glob), joined by +."

    def unknown(self, word: Token, kind: str, known: Collection[str], accepted: str) -> NoReturn:
        close = get_close_matches(word, known, 1)
        self.fail(word, f"Unknown {kind} {word}", (f"Did you mean {close[0]}? " if close else "") + accepted)

    def syntax(self, error: Any) -> NoReturn:
        ended = getattr(error, "token", None) is not None and error.token.type == "$END"
        place = len(self.text.rstrip()) if ended else error.pos_in_stream
        found = "The text ends" if ended else f"Found {getattr(error, 'token', self.text[place])}"
        wanted = sorted(getattr(error, "accepts", None) or error.allowed)
        known = {"TARGET": self.targets(), "METHOD": f"Methods: {', '.join(methods.names())}."}
        lists = " ".join(known[name] for name in wanted if name in known)
        words = " or ".join(_TERMINALS[name] for name in wanted)
        self.fail(Token("", self.text[place : place + 1], start_pos=place), f"{found} where I expected {words}", lists)

    def fail(self, place: Token, problem: str, remedy: str = "", cause: Exception | None = None) -> NoReturn:
        start = place.start_pos or 0
        begin = self.text.rfind("\n", 0, start) + 1
        line = self.text[begin:].partition("\n")[0]
        caret = " " * (start - begin) + "^" * max(1, len(place))
        raise RuleError(f"{problem}:\n    {line}\n    {caret}\n{remedy}".rstrip()) from cause


_TERMINALS = {
    "COLON": "':'", "SEMICOLON": "';'", "COMMA": "','", "PLUS": "'+'", "MINUS": "'-'", "EQUAL": "'='",
    "LPAR": "'('", "RPAR": "')'", "LSQB": "'['", "RSQB": "']'", "$END": "the end",
    "TARGET": "a target", "PATH": "path(glob)", "METHOD": "a method", "QUALIFIER": _QUALIFIERS, "INT": "a layer",
    "OPTION": "option=value", "NUMBER": "a number", "WORD": "true, false, none or a word", "STRING": "a quoted string",
    "TUPLE": "a tuple of whole numbers",
}  # fmt: skip


def _first(node: Any) -> Token:
    while isinstance(node, Tree):
        node = node.children[0]
    return node


def _value(token: Token) -> int | float | bool | str | tuple[int, ...] | None:
    if token.type == "TUPLE":
        return tuple(map(int, re.findall(r"\d+", token)))
    if token.type == "NUMBER":
        return int(token) if re.fullmatch(r"[+-]?\d+", token) else float(token)
    if token.type == "STRING":
        return re.sub(r"\\(.)", r"\1", token[1:-1])
    words: dict[str, bool | None] = {"true": True, "false": False, "none": None}
    return words.get(token.lower(), str(token))
