"""Describe a model's adapters: their sites, the size of their updates, and the choices of their gates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from graphpeft.compat.sharded import gathered
from graphpeft.inspect.adapter_stats import Numbers, numbers
from graphpeft.ir.layers import any_layer
from graphpeft.ir.site import Site
from graphpeft.rewrite.entry import on_model
from graphpeft.rewrite.state import AdapterSet, base_weight, branches, chains, get_state
from graphpeft.show.folding import collapse_layers, layers_text
from graphpeft.show.sites import headings, site_dict, site_row
from graphpeft.show.view import Grid, View


@dataclass(frozen=True)
class Adapted:
    """A site of an adapter, in its current state."""

    site: Site
    method: str
    form: str
    rank: int
    parameters: int
    now: Numbers


@dataclass(frozen=True)
class Adapter:
    name: str
    status: str
    """`active`, `inactive` or `merged`."""
    rules: str
    parameters: int
    """Parameters at all its sites; shared tensors count once."""
    sites: tuple[Adapted, ...]
    strength: float = 1.0
    """The factor on its update while it is active."""


@dataclass(frozen=True)
class Explanation(View):
    """A table for each adapter; prints itself."""

    adapters: tuple[Adapter, ...]
    fold: bool = True

    def blocks(self) -> Iterator[Grid | str]:
        for number, adapter in enumerate(self.adapters):
            strength = "" if adapter.strength == 1 else f" at strength {adapter.strength:g}"
            title = f"{adapter.name} ({adapter.status}{strength}): {adapter.rules}  —  {len(adapter.sites)} sites, "
            if number:
                yield ""
            yield _grid(adapter, f"{title}{adapter.parameters:,} parameters", self.fold)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for `json.dumps`."""
        told = []
        for adapter in self.adapters:
            sites = [asdict(one) | {"site": site_dict(one.site)} for one in adapter.sites]
            told.append(asdict(adapter) | {"sites": sites})
        return {"adapters": told}


@on_model(intact=False)
def explain(model: nn.Module, fold: bool = True) -> Explanation:
    """The adapters of a model and their sites, with equal layers in one line unless `fold` is false.

    `‖ΔW‖/‖W‖` is the Frobenius norm of the update relative to the adapted rows of the weight, the largest of the layers
    in a line; it is 0 before training. Further columns show the effective rank of the update and the choices of gates.
    Raises `AdapterError` for a model without adapters.
    """
    state = get_state(model)
    with gathered(model, branches(model, *state.adapters)):
        return Explanation(_adapters(model, state), fold)


def _adapters(model: nn.Module, state: AdapterSet) -> tuple[Adapter, ...]:
    made = []
    for name, adapter in state.adapters.items():
        status = "merged" if name in state.merged else "active" if name in state.active else "inactive"
        sites, tensors = [], dict[int, int]()
        for entry, (site, chain) in zip(adapter.entries, chains(model, name).items(), strict=True):
            tensors |= {id(p): p.numel() for p in chain.parameters()}
            weight = base_weight(model, site.weight)
            form, count = site.form if chain.has_side_path else "weight", sum(p.numel() for p in chain.parameters())
            sites.append(Adapted(site, str(entry.method), form, chain.rank, count, numbers(chain, weight, site)))
        made.append(
            Adapter(name, status, adapter.rules, sum(tensors.values()), tuple(sites), state.active.get(name, 1.0))
        )
    return tuple(made)


SITE = ("role", "weight", "rows", "size")


def _grid(adapter: Adapter, title: str, fold: bool) -> Grid:
    """One line per site or group of equal layers; columns of statistics that no site has are left out."""
    grouped: dict[tuple[str, ...], list[Numbers]] = {}
    items = []
    for one in adapter.sites:
        row = site_row(one.site)
        if fold and one.site.layer is not None:
            row = row._replace(weight=any_layer(row.weight))
        cells = (*row.cells(*SITE), one.method, one.form, str(one.rank), f"{one.parameters:,}")
        grouped.setdefault(cells, []).append(one.now)
        items.append((cells, one.site.layer))
    columns = [*headings(*SITE), "method", "form", "rank", "parameters"]
    measured = {
        "‖ΔW‖/‖W‖": [_largest(now.update for now in each) for each in grouped.values()],
        "eff. rank": [_largest(now.effective_rank for now in each) for each in grouped.values()],
        "kept": [_span(now.kept for now in each) for each in grouped.values()],
        "bits": [" / ".join(dict.fromkeys(",".join(map(str, now.bits)) for now in each)) for each in grouped.values()],
    }
    given = {title: cells for title, cells in measured.items() if any(cells)}
    rows = [
        (*cells, *(column[number] for column in given.values()), layers_text(layers))
        for number, (cells, layers) in enumerate(collapse_layers(items))
    ]
    return Grid.of([*columns, *given, ""], rows, title, right=["rank", "parameters", *given])


def _largest(values: Iterator[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{max(known):.2g}" if known else ""


def _span(values: Iterator[int | None]) -> str:
    known = sorted({value for value in values if value is not None})
    return "-".join(map(str, dict.fromkeys((known[0], known[-1])))) if known else ""
