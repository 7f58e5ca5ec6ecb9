"""Render a report as one HTML file that contains its data, scripts and libraries."""

from __future__ import annotations

import base64
import hashlib
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

HERE = Path(__file__).parent
LIBRARIES = ("cytoscape.min.js", "dagre.min.js")
SCRIPTS = (
    "dom.js", "overview.js", "table.js", "heat.js", "modules.js", "layout.js", "style.js", "graph.js", "details.js",
    "page.js",
)  # fmt: skip
"""In execution order: each script uses only earlier ones."""


def render(data: dict[str, Any]) -> str:
    """The page for the data that `collect` returns."""
    scripts = [_text(f"vendor/{name}") for name in LIBRARIES] + [_text(name) for name in SCRIPTS]
    page = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    return page.get_template("page.html").render(
        title=data["title"],
        data=_plain(data),
        style=_text("page.css"),
        scripts=scripts,
        allowed=" ".join(map(_hash, scripts)),
    )


def _text(name: str) -> Markup:
    """A file of this package, which needs no escaping."""
    return Markup((HERE / name).read_text(encoding="utf-8"))


def _hash(script: str) -> str:
    """A script's hash for the page's content security policy: the browser runs no other scripts, so data cannot inject any."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _plain(value: Any) -> Any:
    """Convert infinity and NaN, which diverged training leaves and JSON cannot represent, to text."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
