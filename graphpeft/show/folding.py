"""Rows that differ by their layer alone, shown as one."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


def collapse_layers(items: Iterable[tuple[T, int | None]]) -> list[tuple[T, list[int | None]]]:
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
