"""Replace: give sites of an adapter other branches, or none, as passes do that work on trained adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from graphpeft.chain import Chain
from graphpeft.ir.site import Site
from graphpeft.planning.plan import Entry
from graphpeft.rewrite.adapters import places, slot
from graphpeft.rewrite.state import AdapterSet
from graphpeft.rewrite.sync import finish

Made = Mapping[Site, tuple[Entry, Chain] | None]


def replace_branches(model: nn.Module, made: Mapping[str, Made]) -> None:
    """Put these branches where each adapter's old ones were, and record their entries. A site with `None` loses its branch.

    Once begun, it is finished, whatever interrupts it.
    """

    def work(_: nn.Module, state: AdapterSet) -> None:
        for name, branches in made.items():
            _put(state, name, branches)

    finish(model, work)


def _put(state: AdapterSet, name: str, made: Made) -> None:
    adapter = state.adapters[name]
    for site, replacement in made.items():
        for place in places(site):
            adapters = state.containers.get(place.owner)
            if adapters is None or name not in adapters.sites:  # it was done before an interrupt
                continue
            if replacement is None:
                adapters.take(name, place)
                continue
            branch = replacement[1]
            branch.train(adapters.training)
            cast(nn.ModuleDict, adapters._modules[name])._modules[slot(place)] = branch
    now = (made.get(entry.site, (entry, None)) for entry in adapter.entries)
    adapter.entries = tuple(found[0] for found in now if found is not None)
