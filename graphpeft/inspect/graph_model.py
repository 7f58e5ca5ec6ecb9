"""The one form in which graphs are drawn, compared, written to files, and asked questions: what a node's attributes mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from graphpeft.rewrite.adapters import HOME


class Node(TypedDict, total=False):
    """Attributes of a node. What does not apply is left out, but for `kind` and `op`."""

    kind: str
    """`input`, `weight`, `constant`, `op` or `output`."""
    op: str
    """The operator's plain name."""
    arguments: str
    """Its arguments as text, with `%` for each edge that enters: `%, [%, %], dim=1`."""
    path: str
    """The module that ran it, from the root; of an inserted node the adapter's branch below that module."""
    type: str
    """The class of that module."""
    layer: int
    """The number of the repeated block that it is in."""
    shape: str
    dtype: str
    source: str
    """`file.py:line` of the model's code."""
    code: str
    """That line."""
    weight: str
    """Of a node that reads a parameter: its name in `state_dict()`. Of a projection: the parameter's."""
    values: int
    """A checksum of a weight's values."""
    numbers: int
    """How many numbers a weight holds."""
    role: str
    site: str
    """Of an inserted node: the weight that it adapts."""
    adapter: str
    """Of an inserted node: the adapter's name."""
    rule: str
    method: str


def shown(about: Mapping[str, Any]) -> str:
    """A parameter's name; an adapter's below the module that it adapts, wherever it is kept."""
    weight, adapter = about["weight"], about.get("adapter")
    return f"{about['path']}.{weight.partition(f'{HOME}.{adapter}.')[2].partition('.')[2]}" if adapter else str(weight)
