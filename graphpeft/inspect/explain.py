"""What is on a model now: its adapters, their sites, and how far they have moved."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from graphpeft.inspect.table import folded, layers_text, names_text, role_text, rows_text, size_text, table
from graphpeft.program import stored
from graphpeft.state import chains, get_state
from graphpeft.weight_form import update


@dataclass(frozen=True)
class Explanation:
    """A table of sites and adapters; prints itself."""

    text: str

    def __str__(self) -> str:
        return self.text


def explain(model: nn.Module, fold: bool = True) -> Explanation:
    """The sites and adapters of an adapted model, equal layers in one line unless `fold` is false.

    `‖ΔW‖/‖W‖` is the Frobenius norm of the update relative to the adapted rows of the weight, largest over the layers
    that share a line: 0 before training. Raises `AdapterError` for a model without adapters.
    """
    state = get_state(model)
    blocks = []
    for name, adapter in state.adapters.items():
        status = "merged" if name in state.merged else "active" if name in state.active else "resting"
        lines: dict[str, list[float]] = {}
        items: list[tuple[str, int | None]] = []
        for entry, (site, chain) in zip(adapter.entries, chains(model, name).items(), strict=True):
            where = names_text(site)
            where = re.sub(r"\.\d+\.", ".*.", where, count=1) if fold and site.layer is not None else where
            role = role_text(site)
            cells = (
                role,
                where,
                rows_text(site.rows),
                size_text(site),
                entry.method,
                site.form if chain.beside else "weight",
                chain.rank,
            )
            key = "\t".join([*map(str, cells), f"{sum(p.numel() for p in chain.parameters()):,}"])
            items.append((key, site.layer))
            original = state.originals.get(site.weight, stored(model, site.weight))
            lines.setdefault(key, []).append(_moved(update(chain, original, site), original))
        columns = ("role", "weight", "rows", "out × in", "method", "form", "rank", "parameters", "‖ΔW‖/‖W‖", "")
        rows = [(*key.split("\t"), f"{max(lines[key]):.2g}", layers_text(layers)) for key, layers in folded(items)]
        count = sum(
            p.numel() for p in {id(p): p for c in chains(model, name).values() for p in c.parameters()}.values()
        )
        title = f"{name} ({status}): {adapter.rules}  —  {len(adapter.entries)} sites, {count:,} parameters"
        blocks.append(table(columns, rows, title, right=["rank", "parameters", "‖ΔW‖/‖W‖"]))
    return Explanation("\n\n".join(blocks))


@torch.no_grad()
def _moved(delta: torch.Tensor, weight: torch.Tensor) -> float:
    if delta.is_meta:
        return float("nan")
    return float(delta.norm() / weight.float().norm().clamp_min(1e-30))
