"""What functions return for people to read: text when printed, color on a rich console, HTML in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from graphpeft.inspect.table import as_text

STYLES = {"+": "green", "-": "red"}
HTML = {"+": "color:#1a7f37", "-": "color:#cf222e"}


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
        made = Table(title=self.title, title_justify="left", box=None, pad_edge=False, header_style="bold")
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


class View:
    """A mixin: `blocks` gives tables and lines, in their order; of a line that begins with + or - the sign colors it."""

    def blocks(self) -> Iterator[Grid | str]:
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join(block if isinstance(block, str) else as_text(block.rich()) for block in self.blocks())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for block in self.blocks():
            if isinstance(block, Grid):
                yield block.rich()
            else:
                for line in block.split("\n"):
                    yield Text(line, style=STYLES.get(line[:1], ""))

    def _repr_html_(self) -> str:
        return "\n".join(_html(block) for block in self.blocks())


def _html(block: Grid | str) -> str:
    if isinstance(block, Grid):
        return block.html()
    lines = (f'<span style="{HTML.get(line[:1], "")}">{escape(line)}</span>' for line in block.split("\n"))
    return "<pre>" + "\n".join(lines) + "</pre>"
