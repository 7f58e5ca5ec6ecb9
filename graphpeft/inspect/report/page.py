"""The page of a report: one HTML file that holds its data, its scripts and the libraries that they use."""

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
"""In the order in which they run: each uses only those before it."""


def render(data: dict[str, Any]) -> str:
    """The page for what `collect` returns."""
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
    """A file of ours, which needs no escaping."""
    return Markup((HERE / name).read_text(encoding="utf-8"))


def _hash(script: str) -> str:
    """The browser runs only scripts with these hashes, so nothing in the data can become one."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _plain(value: Any) -> Any:
    """JSON has no word for infinity and NaN, which a training that diverged leaves behind: they are shown as text."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
