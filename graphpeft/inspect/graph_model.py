"""Attributes of graph nodes, in the one form that all views use to draw, compare, write and query graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from graphpeft.rewrite.adapters import HOME


class Node(TypedDict, total=False):
    """A node's attributes. `kind` and `op` are always there; others only if they apply."""

    kind: str
    """`input`, `weight`, `constant`, `op` or `output`."""
    op: str
    """The operator's plain name."""
    arguments: str
    """Its arguments as text, with `%` for each incoming edge: `%, [%, %], dim=1`."""
    path: str
    """Path from the root of the module that runs it; for an inserted node, of the adapter's branch in that module."""
    type: str
    """The class of that module."""
    layer: int
    """The index of its repeated block."""
    shape: str
    dtype: str
    source: str
    """`file.py:line` in the model's code."""
    code: str
    """The text of that line."""
    weight: str
    """For a weight or a projection: the parameter's name in `state_dict()`."""
    values: int
    """A checksum of a weight's values."""
    numbers: int
    """The number of elements of a weight."""
    role: str
    site: str
    """For an inserted node: the weight that it adapts."""
    adapter: str
    """For an inserted node: the adapter's name."""
    rule: str
    method: str


def shown(about: Mapping[str, Any]) -> str:
    """A parameter's name for display; an adapter's parameter is placed below the module that it adapts."""
    weight, adapter = about["weight"], about.get("adapter")
    return f"{about['path']}.{weight.partition(f'{HOME}.{adapter}.')[2].partition('.')[2]}" if adapter else str(weight)
