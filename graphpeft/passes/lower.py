"""Lower: convert an adapter of any method to the plain LoRA that equals it, where one exists."""

from __future__ import annotations

import torch
from torch import nn

from graphpeft.ambient import plain
from graphpeft.chain import Chain
from graphpeft.compat.sharded import ELSEWHERE, refuse_sharded
from graphpeft.errors import AdapterError
from graphpeft.ir.site import Site
from graphpeft.methods.lora import LoRA
from graphpeft.planning.plan import Entry
from graphpeft.rewrite.entry import on_model
from graphpeft.rewrite.replace import replace_branches
from graphpeft.rewrite.state import chains, get_state, names, refuse_merged
from graphpeft.tracing import as_pass


@as_pass("lower", "convert adapters to plain LoRA")
@plain()
@on_model()
def lower(model: nn.Module, name: str | None = None) -> nn.Module:
    """Convert an adapter (without `name`, all of them) to plain LoRA with the same update ΔW; returns the model.

    The rank is the chain's: n · r for MELoRA, 2r for OLoRA and PiSSA (their ΔW is relative to the original base
    weight), and r otherwise. In a fused projection the pair covers only the adapted rows. Noise and gates take their
    evaluation values, and dropout is removed. Raises `AdapterError`, and changes nothing, for an update without a
    low-rank factorization, a merged model, or tensors on the meta device.
    """
    refuse_merged(model, "lower")
    refuse_sharded(model, "lower", ELSEWHERE)
    state = get_state(model)
    lowered: dict[str, dict[Site, tuple[Entry, Chain]]] = {}
    for adapter in names(model, name):
        found = chains(model, adapter)
        lowered[adapter] = {
            entry.site: _plain(entry, found[entry.site], adapter)
            for entry in state.adapters[adapter].entries
            if not isinstance(entry.method, LoRA)
        }
    replace_branches(model, lowered)
    return model


def _plain(entry: Entry, chain: Chain, adapter: str) -> tuple[Entry, Chain]:
    site = entry.site
    if chain.device.type == "meta":
        raise AdapterError(
            f"Adapter {adapter!r} has no values at {site.weight}: it is on the meta device. Load weights first."
        )
    with torch.no_grad(), chain.as_trained():
        try:
            a, b = chain.to_lora()
        except AdapterError as error:
            raise AdapterError(f"Adapter {adapter!r} at {site.weight} ({site.role}): {error}") from error
    if site.rows:
        b = torch.cat([b[..., start:stop, :] for start, stop in site.rows], -2)
    made = Entry(site, LoRA(r=a.shape[-2]), entry.rule)
    with torch.device(chain.device):
        plain = made.build().to(chain.dtype)
    left, right = list(plain.factors)[-2:]
    with torch.no_grad():
        left.weight.copy_(b)  # type: ignore[operator]
        right.weight.copy_(a)  # type: ignore[operator]
    return made, plain
