"""Results for people to read: text when printed, color on a rich console, HTML in a notebook."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from graphpeft.show.table import Grid as Grid
from graphpeft.show.table import as_text

STYLES = {"+": "green", "-": "red"}
HTML = {"+": "color:#1a7f37", "-": "color:#cf222e"}


class View:
    """A mixin: `blocks` yields tables and lines in order; a leading + or - colors its line."""

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
