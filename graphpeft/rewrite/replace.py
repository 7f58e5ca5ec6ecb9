"""Replace: give sites of an adapter other branches, or none, as passes do that work on trained adapters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from graphpeft.chain import Chain
from graphpeft.ir.site import Site
from graphpeft.planning.plan import Entry
from graphpeft.rewrite.adapters import HOME, home, places, slot
from graphpeft.rewrite.owner import relower, vacate
from graphpeft.rewrite.state import get_state


def replace_branches(model: nn.Module, name: str, made: Mapping[Site, tuple[Entry, Chain] | None]) -> None:
    """Put these branches where the adapter's old ones were, and note their entries. Cannot fail half-way.

    A site with `None` loses its branch.
    """
    adapter = get_state(model).adapters[name]
    touched: dict[str, nn.Module] = {}
    for site, replacement in made.items():
        for place in places(site):
            owner = touched.setdefault(place.owner, model.get_submodule(place.owner))
            adapters = home(owner)
            assert adapters is not None, f"{place.owner} lost its {HOME}"
            old = next(b for s, b, _ in adapters.branches(name) if s == place)
            if replacement is None:
                adapters.take(name, place)
                continue
            branch = replacement[1]
            branch.train(adapters.training)
            branch.requires_grad_(any(p.requires_grad for p in old.parameters()))
            adapters.get_submodule(name)._modules[slot(place)] = branch
    now = (made.get(entry.site, (entry, None)) for entry in adapter.entries)
    adapter.entries = tuple(found[0] for found in now if found is not None)
    for owner in touched.values():
        adapters = home(owner)
        if adapters is not None and adapters.sites:
            relower(owner)
        else:
            vacate(owner)
