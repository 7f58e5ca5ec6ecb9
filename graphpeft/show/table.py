"""Tables as text, so that what a function returns can print itself anywhere."""

from __future__ import annotations

import io
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphpeft.ir.site import Rows, Site

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class Grid:
    """A table. Columns named in `right` are right-aligned."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str | None = None
    right: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        columns: Sequence[str],
        rows: Iterable[Sequence[object]],
        title: str | None = None,
        right: Iterable[str] = (),
    ) -> Grid:
        return cls(columns, [tuple(map(str, row)) for row in rows], title, frozenset(right))

    def rich(self) -> Table:
        title = Text(self.title, "bold") if self.title else None  # as a string, `[...]` would be markup
        made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for name in self.columns:
            made.add_column(name, justify="right" if name in self.right else "left", no_wrap=True)
        for row in self.rows:
            made.add_row(*map(Text, row))
        return made

    def html(self) -> str:
        align = [
            ' style="text-align:right"' if name in self.right else ' style="text-align:left"' for name in self.columns
        ]
        head = "".join(f"<th{a}>{escape(name)}</th>" for a, name in zip(align, self.columns, strict=True))
        rows = (zip(align, row, strict=True) for row in self.rows)
        body = "".join("<tr>" + "".join(f"<td{a}>{escape(cell)}</td>" for a, cell in row) + "</tr>" for row in rows)
        title = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None, right: Iterable[str] = ()
) -> str:
    """A plain table; columns named in `right` are right-aligned."""
    return as_text(Grid.of(columns, rows, title, right).rich())


def as_text(made: Table) -> str:
    """A rich table as plain lines."""
    # As wide as its contents: a table that is cut to the terminal would lose the ends of the weights' names.
    console = Console(file=io.StringIO(), width=400, color_system=None)
    console.print(made)
    output = console.file
    assert isinstance(output, io.StringIO)
    return "\n".join(line.rstrip() for line in output.getvalue().rstrip().splitlines())


def site_dict(site: Site) -> dict[str, Any]:
    """What is known of a site, as plain values."""
    names = ("weight", "rows", "shape", "stack", "form", "layer", "cross", "source")
    return {"role": role_text(site), "tied": [s.weight for s in site.tied]} | {n: getattr(site, n) for n in names}


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


def any_outside(reason: str) -> str:
    """A rule's reason with the number of a layer that it leaves out taken out, so that equal ones fold."""
    return re.sub(r"^layer \d+ outside", "its layer is outside", reason)


def outside_text(reason: str, layers: Sequence[int | None]) -> str:
    """Such a reason with the layers that it stands for."""
    known = layers_text(layers).rpartition(", ")[2]
    return reason.replace("its layer is outside", f"{known} outside") if known else reason


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
