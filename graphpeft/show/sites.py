"""One row per site, in the words that every table uses."""

from __future__ import annotations

from typing import Any, NamedTuple

from graphpeft.ir.site import Rows, Site


class SiteRow(NamedTuple):
    """The text of a site in tables."""

    role: str
    weight: str
    rows: str
    size: str
    layer: str
    form: str
    source: str

    def cells(self, *columns: str) -> tuple[str, ...]:
        """The cells of these columns."""
        return tuple(getattr(self, column) for column in columns)


def site_row(site: Site) -> SiteRow:
    """The row of a site."""
    layer = "" if site.layer is None else str(site.layer)
    return SiteRow(
        role_text(site), names_text(site), rows_text(site.rows), size_text(site), layer, site.form, site.source
    )


def headings(*columns: str) -> tuple[str, ...]:
    """The headings of these columns."""
    return tuple("out × in" if column == "size" else column for column in columns)


def site_dict(site: Site) -> dict[str, Any]:
    """The facts about a site as plain values."""
    names = ("weight", "rows", "shape", "stack", "form", "layer", "cross", "source")
    return {"role": role_text(site), "tied": [s.weight for s in site.tied]} | {n: getattr(site, n) for n in names}


def rows_text(rows: Rows | None) -> str:
    """`all`, `0:64`, or a count if there are many runs."""
    if rows is None:
        return "all"
    if len(rows) <= 2:
        return " ".join(f"{a}:{b}" for a, b in rows)
    return f"{rows[0][0]}:{rows[0][1]} … {rows[-1][0]}:{rows[-1][1]} ({len(rows)} runs)"


def role_text(site: Site) -> str:
    """`q`, `q cross`; `embed+head` for a tied weight with several roles."""
    return "+".join(dict.fromkeys(place.role for place in (site, *site.tied))) + (" cross" if site.cross else "")


def size_text(site: Site) -> str:
    """`out × in`; `n × out × in` if the weight is a stack of matrices."""
    return " × ".join(map(str, (*((site.stack,) if site.stack else ()), *site.shape)))


def names_text(site: Site) -> str:
    """The weight's name; `a = b = c` for a tied weight."""
    return " = ".join((site.weight, *(place.weight for place in site.tied)))
