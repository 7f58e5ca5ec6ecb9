"""Swap: copy a saved adapter's values into the tensors of an adapter that is on the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from graphpeft.ambient import plain
from graphpeft.capturing.capture import Inputs
from graphpeft.chain import ActivationQuantizer, Chain, Dense
from graphpeft.errors import AdapterError
from graphpeft.ir.site import Site
from graphpeft.methods.lora import LoRA
from graphpeft.passes.load import insert_content
from graphpeft.passes.remove import remove
from graphpeft.rewrite.adapters import places
from graphpeft.rewrite.entry import on_model
from graphpeft.rewrite.fill import fill
from graphpeft.rewrite.state import Adapter, AdapterSet, chains, get_state, names, refuse_merged
from graphpeft.rewrite.sync import finish
from graphpeft.store.hub import local
from graphpeft.store.read import read
from graphpeft.tracing import as_pass


@as_pass("swap", "replace an adapter's values in place")
@plain()
@torch.no_grad()
@on_model()
def swap(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    *,
    any_base: bool = False,
    hub: bool = False,
    revision: str | None = None,
    inputs: Inputs = None,
) -> nn.Module:
    """Replace the values of the adapter `name` by those in a folder, in place; returns the model.

    Tensors and code stay the same objects, so compiled models do not compile again. The folder's adapter fits if it has
    the same method and options at the same sites. A plain LoRA adapter accepts more: any adapter that equals plain LoRA
    of no larger rank, at some or all of its sites, with any scale. So create it once with the largest rank you will
    swap in. Sites that the folder does not adapt get a zero update. The previous values are lost; save them first.

    Args:
        folder: as for `load`, including PEFT's format.
        any_base, hub, revision, inputs: as for `load`.

    Raises `AdapterError` for an unknown name, a merged model, or an adapter that does not fit; `FileError` as `load` does.
    The model is then as it was.
    """
    refuse_merged(model, "swap an adapter")
    names(model, name)
    state = get_state(model)
    held = state.adapters[name]
    if held.objective is not None:
        raise AdapterError(
            f"Adapter {name!r} has a PAC-Bayes objective, whose noise belongs to the old values. Detach the objective first."
        )
    visitor = next(n for i in range(len(state.adapters) + 1) if (n := f"swapped_in_{i}") not in state.adapters)
    sites = tuple(entry.site for entry in held.entries)
    content = read(model, local(folder, revision, hub), visitor, sites, any_base=any_base, strict=True)
    insert_content(model, visitor, content)
    try:
        _swap(model, name, held, visitor)
    finally:
        remove(model, visitor)
    return model


def _swap(model: nn.Module, name: str, held: Adapter, visitor: str) -> None:
    state = get_state(model)
    coming = state.adapters[visitor]
    here, there = chains(model, name), {site.key: chain for site, chain in chains(model, visitor).items()}
    methods = {entry.site.key: entry.method for entry in held.entries}
    ours, theirs = (_places(adapter) for adapter in (held, coming))
    if other := sorted(key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key]):
        raise AdapterError(
            f"At {other[0]} adapter {name!r} acts on {', '.join(sorted(ours[other[0]]))}, and the folder on "
            f"{', '.join(sorted(theirs[other[0]]))}: only one of the two treats the weight as tied. Use gp.load instead."
        )
    if methods == {entry.site.key: entry.method for entry in coming.entries}:
        pairs = [(chain, there[site.key]) for site, chain in here.items()]
        copies = [pair for ours, its in pairs for pair in zip(_tensors(ours), _tensors(its), strict=True)]
        known = [each for ours, its in pairs for each in zip(_quantizers(ours), _quantizers(its), strict=True)]
        swapped = replace(held, rules=coming.rules, seed=coming.seed)

        def work(_: nn.Module, record: AdapterSet) -> None:
            for mine, its in copies:
                mine.copy_(its)
            for quantizer, other in known:
                quantizer.known = other.known
            record.adapters = {**record.adapters, name: swapped}

        finish(model, work)
        return
    if strange := sorted(there.keys() - methods.keys()):
        raise AdapterError(
            f"The folder adapts {strange[0]}, where adapter {name!r} has no site. Create an adapter with all sites that will be "
            f"swapped in, or load this one as a second adapter with gp.load."
        )
    if not_lora := [key for key, method in methods.items() if not isinstance(method, LoRA)]:
        raise AdapterError(
            f"At {not_lora[0]} adapter {name!r} is {methods[not_lora[0]]}, and the folder has another method or other options. "
            f"It accepts only its own method and options; plain LoRA, such as `lora(r=64)`, accepts any method that equals LoRA."
        )
    filled = {site: _pair(site, chain, there.get(site.key)) for site, chain in here.items()}

    def refill(_: nn.Module, __: AdapterSet) -> None:
        for site, chain in here.items():
            fill(chain, *filled[site], site)

    finish(model, refill)


def _places(adapter: Adapter) -> dict[str, set[str]]:
    """The weights of each site, including all names of a tied one."""
    return {entry.site.key: {place.weight for place in places(entry.site)} for entry in adapter.entries}


def _tensors(chain: Chain) -> Iterator[torch.Tensor]:
    """All tensors of the chain, including those drawn from a seed, which no state dict holds."""
    yield from chain.parameters()
    yield from chain.buffers()


def _quantizers(chain: Chain) -> list[ActivationQuantizer]:
    """Those that remember whether they have seen data, which is in no tensor."""
    return [module for module in chain.modules() if isinstance(module, ActivationQuantizer)]


def _pair(site: Site, chain: Chain, coming: Chain | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The A and B to copy into a site; zeros if the folder does not adapt it."""
    b, a = (cast(Dense, factor).weight for factor in list(chain.factors)[-2:])
    if coming is None:
        return torch.zeros_like(a), torch.zeros_like(b)
    try:
        with coming.settled():
            pair = coming.to_lora()
    except AdapterError as error:
        raise AdapterError(f"{site.weight} ({site.role}): {error}") from error
    if pair[0].shape[-2] > a.shape[-2]:
        raise AdapterError(
            f"{site.weight} ({site.role}) has rank {a.shape[-2]}, and the folder's update has {pair[0].shape[-2]}. Create the "
            f"adapter with the largest rank that will be swapped in; smaller ranks are padded with zeros."
        )
    return pair
