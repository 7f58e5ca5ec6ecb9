"""Replace: give sites of an adapter other branches, as passes do that work on trained adapters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from graphpeft.adapters import HOME, home, places, slot
from graphpeft.chain import Chain
from graphpeft.owner import relower
from graphpeft.plan import Entry
from graphpeft.program import Site
from graphpeft.state import get_state


def replace_branches(model: nn.Module, name: str, made: Mapping[Site, tuple[Entry, Chain]]) -> None:
    """Put these branches where the adapter's old ones were, and note their entries. Cannot fail half-way."""
    adapter = get_state(model).adapters[name]
    touched: dict[str, nn.Module] = {}
    for site, (_, branch) in made.items():
        for place in places(site):
            owner = touched.setdefault(place.owner, model.get_submodule(place.owner))
            adapters = home(owner)
            assert adapters is not None, f"{place.owner} lost its {HOME}"
            branch.train(adapters.training)
            old = next(b for s, b, _ in adapters.branches(name) if s == place)
            branch.requires_grad_(any(p.requires_grad for p in old.parameters()))
            adapters.get_submodule(name)._modules[slot(place)] = branch
    adapter.entries = tuple(made[e.site][0] if e.site in made else e for e in adapter.entries)
    for owner in touched.values():
        relower(owner)
