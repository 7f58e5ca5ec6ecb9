"""Tables as text, so that what a function returns can print itself anywhere."""

from __future__ import annotations

import io
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from graphpeft.program import Rows, Site

T = TypeVar("T", bound=Hashable)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None, right: Iterable[str] = ()
) -> str:
    """A plain table; columns named in `right` are right-aligned."""
    aligned = set(right)
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in columns:
        made.add_column(name, justify="right" if name in aligned else "left", no_wrap=True)
    for row in rows:
        made.add_row(*map(str, row))
    return as_text(made)


def as_text(made: Table) -> str:
    """A rich table as plain lines."""
    # As wide as its contents: a table that is cut to the terminal would lose the ends of the weights' names.
    console = Console(file=io.StringIO(), width=400, color_system=None)
    console.print(made)
    output = console.file
    assert isinstance(output, io.StringIO)
    return "\n".join(line.rstrip() for line in output.getvalue().rstrip().splitlines())


def rows_text(rows: Rows | None) -> str:
    """`all`, `0:64`, or a count where there are many runs."""
    if rows is None:
        return "all"
    if len(rows) <= 2:
        return " ".join(f"{a}:{b}" for a, b in rows)
    return f"{rows[0][0]}:{rows[0][1]} … {rows[-1][0]}:{rows[-1][1]} ({len(rows)} runs)"


def role_text(site: Site) -> str:
    """`q`, `q cross`; of a tied weight with several roles `embed+head`."""
    return "+".join(dict.fromkeys(place.role for place in (site, *site.tied))) + (" cross" if site.cross else "")


def size_text(site: Site) -> str:
    """`out × in`; `n × out × in` where the weight is a stack of matrices."""
    return " × ".join(map(str, (*((site.stack,) if site.stack else ()), *site.shape)))


def names_text(site: Site) -> str:
    """The weight's name; of a tied one `a = b = c`."""
    return " = ".join((site.weight, *(place.weight for place in site.tied)))


def folded(items: Iterable[tuple[T, int | None]]) -> list[tuple[T, list[int | None]]]:
    """Group what is equal: each thing once, with the layers it stands for, in order of first appearance."""
    groups: dict[T, list[int | None]] = {}
    for text, layer in items:
        groups.setdefault(text, []).append(layer)
    return list(groups.items())


def layers_text(layers: Sequence[int | None]) -> str:
    """`× 32, layers 0-31`; nothing for a single one."""
    known = sorted({n for n in layers if n is not None})
    if len(layers) < 2 or not known:
        return f"layer {known[0]}" if known else ""
    spans: list[list[int]] = []
    for n in known:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    text = ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)
    return f"× {len(layers)}, layers {text}"
