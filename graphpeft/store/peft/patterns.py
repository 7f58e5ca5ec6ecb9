"""Regexes of a PEFT config, matched as PEFT does, and in bounded time: a stranger may have written them.

`re` tries one way through a pattern after the other, and nested repeats have exponentially many. So `re` matches only
patterns that have few ways. For all others, each part of the pattern is tried only once at each place of a name, which
takes time that is polynomial in both lengths.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection

from graphpeft.compat.regexes import Char, Either, Look, Node, Odd, Repeat, Run, Spot, parse
from graphpeft.files.foreign import shortened

LONGEST = 10_000
"""Characters of a pattern. Lists of literal names may be longer."""
FEW = 100_000
"""Ways through a pattern that `re` may try for one name: a millisecond."""
MANY = 10_000_000
"""As `FEW`, for patterns that `re` alone can match, because what a group matched is wanted."""
SECONDS = 10.0
"""Time of the processor for all matches of one config. Patterns that people write take milliseconds."""
NEVER = 1e30
"""As many ways as `re` never goes."""
Ends = frozenset[int]


class Patterns:
    """Matches the regexes of one config. Raises `ValueError` if they are too long, or take too long."""

    def __init__(self) -> None:
        self._until = time.thread_time() + SECONDS
        self._trees: dict[str, Node] = {}
        self._lists: dict[str, frozenset[str] | None] = {}

    def whole(self, pattern: str, name: str) -> bool:
        """As `re.fullmatch`."""
        if pattern not in self._lists:
            self._lists[pattern] = _names(pattern)
        listed = self._lists[pattern]
        return name in listed if listed is not None else self._matches(pattern, name, re.fullmatch)

    def start(self, pattern: str, name: str) -> bool:
        """As `re.match`."""
        return self._matches(pattern, name, re.match)

    def first(self, pattern: str, name: str) -> re.Match[str] | None:
        """The match of `re.match`, for patterns of which only simple ones make sense."""
        if ways(self._tree(pattern), len(name)) > MANY:
            raise ValueError(f"the pattern {shortened(pattern)!r} is too complex for what it selects.")
        return re.match(pattern, name)

    def _matches(self, pattern: str, name: str, match: Callable[[str, str], re.Match[str] | None]) -> bool:
        tree = self._tree(pattern)
        if ways(tree, len(name)) <= FEW:
            return match(pattern, name) is not None
        ends = _Matcher(name, lambda: self._check(pattern)).ends(tree, 0)
        return bool(ends) if match is re.match else len(name) in ends

    def _tree(self, pattern: str) -> Node:
        self._check(pattern)
        if pattern not in self._trees:
            if len(pattern) > LONGEST:
                raise ValueError(
                    f"the pattern {shortened(pattern)!r} has {len(pattern)} characters; {LONGEST} are the most."
                )
            self._trees[pattern] = parse(pattern)
        return self._trees[pattern]

    def _check(self, pattern: str) -> None:
        if time.thread_time() > self._until:
            raise ValueError(
                f"its patterns, such as {shortened(pattern)!r}, take longer than {SECONDS:g} seconds to match."
            )


def _names(pattern: str) -> frozenset[str] | None:
    """The names of a pattern that only lists literal names, as graphpeft writes it for many modules."""
    names = [re.sub(r"\\(.)", r"\1", each) for each in pattern.split("|")]
    return frozenset(names) if "|".join(map(re.escape, names)) == pattern else None


def ways(node: Node, length: int) -> float:
    """An upper bound for the ways through a pattern that `re` may try in a name of this length."""
    if isinstance(node, Char):
        return NEVER if node.wide else 1
    if isinstance(node, Spot):
        return 1
    if isinstance(node, Run):
        found = 1.0
        for part in node.parts:
            found = min(found * ways(part, length), NEVER)
        return found
    if isinstance(node, Either):
        return sum(ways(branch, length) for branch in node.branches)
    if isinstance(node, (Look, Odd)):
        return ways(node.body, length)
    most = min(node.most, length + 1)
    inner = ways(node.body, length)
    if isinstance(node.body, Char):
        return max(most + 1, inner)
    return min((1 + inner) ** most, NEVER) if most < 8 else NEVER


class _Matcher:
    """Where the parts of a pattern may end in one name; each is computed once for each place where it begins."""

    def __init__(self, name: str, check: Callable[[], None]) -> None:
        self.name, self.check = name, check
        self.known: dict[tuple[int, int], Ends] = {}

    def ends(self, node: Node, start: int) -> Ends:
        if isinstance(node, Char):
            fits = start < len(self.name) and node.fits(self.name[start])
            return frozenset((start + 1,)) if fits else frozenset()
        key = id(node), start
        if key not in self.known:
            self.check()
            self.known[key] = frozenset(self._ends(node, start))
        return self.known[key]

    def _ends(self, node: Node, start: int) -> Collection[int]:
        if isinstance(node, Run):
            found: Collection[int] = (start,)
            for part in node.parts:
                found = self._after(part, found)
            return found
        if isinstance(node, Either):
            return {end for branch in node.branches for end in self.ends(branch, start)}
        if isinstance(node, Repeat):
            return self._row(node, node.body, start) if isinstance(node.body, Char) else self._repeated(node, start)
        if isinstance(node, Spot):
            return (start,) if node.fits(self.name, start) else ()
        if isinstance(node, Look):
            return (start,) if self._seen(node, start) == node.wanted else ()
        raise ValueError(
            "a pattern with many repeats has a backreference, an atomic group or a possessive repeat, too."
        )

    def _after(self, node: Node, starts: Collection[int]) -> set[int]:
        return {end for start in starts for end in self.ends(node, start)}

    def _row(self, node: Repeat, char: Char, start: int) -> range:
        last = min(len(self.name), start + node.most)
        end = next((i for i in range(start, last) if not char.fits(self.name[i])), last)
        return range(start + node.least, end + 1)

    def _repeated(self, node: Repeat, start: int) -> set[int]:
        # After more rounds than characters, another round changes nothing: it matched the empty text somewhere.
        rounds = len(self.name) - start + 1
        reached: set[int] = {start}
        for _ in range(min(node.least, rounds)):
            reached = self._after(node.body, reached)
        found, new = set(reached), reached
        for _ in range(min(node.most - node.least, rounds)):
            new = self._after(node.body, new) - found
            if not new:
                break
            found |= new
        return found

    def _seen(self, node: Look, start: int) -> bool:
        if node.behind is None:
            return bool(self.ends(node.body, start))
        return node.behind <= start and start in self.ends(node.body, start - node.behind)
