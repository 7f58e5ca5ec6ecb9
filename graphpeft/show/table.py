"""Tables as text, so that any result can print itself anywhere."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from rich.console import Console
from rich.table import Table
from rich.text import Text


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
    # Do not fit the table to the terminal: that would cut off the ends of the weights' names.
    console = Console(file=io.StringIO(), width=400, color_system=None)
    console.print(made)
    output = console.file
    assert isinstance(output, io.StringIO)
    return "\n".join(line.rstrip() for line in output.getvalue().rstrip().splitlines())
