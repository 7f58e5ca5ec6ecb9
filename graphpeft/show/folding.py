"""Show rows that differ only by their layer as one row."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


def collapse_layers(items: Iterable[tuple[T, int | None]]) -> list[tuple[T, list[int | None]]]:
    """Group equal items: each item once, with its layers, in order of first appearance."""
    groups: dict[T, list[int | None]] = {}
    for text, layer in items:
        groups.setdefault(text, []).append(layer)
    return list(groups.items())


def any_outside(reason: str) -> str:
    """A rule's reason without the number of the excluded layer, so that equal reasons can be grouped."""
    return re.sub(r"^layer \d+ outside", "its layer is outside", reason)


def outside_text(reason: str, layers: Sequence[int | None]) -> str:
    """Such a reason with the layers that it applies to."""
    known = layers_text(layers).rpartition(", ")[2]
    return reason.replace("its layer is outside", f"{known} outside") if known else reason


def layers_text(layers: Sequence[int | None]) -> str:
    """`× 32, layers 0-31`; `layer 0` for a single item, empty without a layer."""
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
