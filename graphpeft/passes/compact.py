"""Compact: after training, drop what the gates closed and store the precisions they chose, with the same outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphpeft.ambient import plain
from graphpeft.chain import (
    ActivationQuantizer,
    Chain,
    FakeQuantizer,
    IntCodes,
    LearnedQuantizer,
    RankGate,
    Stack,
    Weighted,
)
from graphpeft.compat.sharded import ELSEWHERE, refuse_sharded
from graphpeft.errors import AdapterError
from graphpeft.ir.site import Site
from graphpeft.planning.plan import Entry
from graphpeft.rewrite.entry import on_model
from graphpeft.rewrite.replace import replace_branches
from graphpeft.rewrite.state import chains, get_state, names, refuse_merged
from graphpeft.tracing import as_pass

Made = tuple[Entry, Chain]


@as_pass("compact", "shrink adapters to the ranks and precisions their gates learned")
@plain()
@on_model()
def compact(model: nn.Module, name: str | None = None) -> nn.Module:
    """Replace learned ranks and precisions by smaller tensors; without `name`, in all adapters. Returns the model.

    Directions with closed gates are removed. Tensors below 32 bits become integers with a step size and no longer train.
    A site with nothing left loses its adapter. Outputs in evaluation mode stay the same, up to the rounding of shorter
    sums. Raises `AdapterError`, and changes nothing, if no adapter has gates, an adapter would lose all its sites, it
    adapts stacked experts, the model is merged, tensors are on the meta device, or an activation quantizer has seen no
    data.
    """
    refuse_merged(model, "compact")
    refuse_sharded(model, "compact", ELSEWHERE)
    made: dict[str, dict[Site, Made | None]] = {}
    for adapter in names(model, name):
        made[adapter] = _smaller(model, adapter)
        if made[adapter] and not any(
            made[adapter].get(e.site, True) for e in get_state(model).adapters[adapter].entries
        ):
            raise AdapterError(
                f"Nothing is left of adapter {adapter!r}: its gates are closed at every site. Usually the penalty was too "
                f"large. Train with a smaller one, or call gp.remove(model, {adapter!r})."
            )
    if not any(made.values()):
        raise AdapterError(
            f"No adapter of {type(model).__name__} has gates that decide a rank or a precision, so there is nothing to "
            f"compact. Train one that has: `blora`."
        )
    replace_branches(model, made)
    return model


def _smaller(model: nn.Module, adapter: str) -> dict[Site, Made | None]:
    """The smaller form of each site's branch, where there is one; `None` where nothing is left."""
    made: dict[Site, Made | None] = {}
    found = chains(model, adapter)
    for entry in get_state(model).adapters[adapter].entries:
        chain = found[entry.site]
        _check(entry.site, chain, adapter)
        method = entry.method.compacted(chain)
        if method == entry.method:
            continue
        if method is None:
            made[entry.site] = None
            continue
        smaller = Entry(entry.site, method, entry.rule, entry.as_it_is(chain).scale)
        with torch.device(chain.device):
            branch = smaller.build().to(chain.dtype)
        _fill(chain, branch)
        made[entry.site] = smaller, branch
    return made


def _check(site: Site, chain: Chain, adapter: str) -> None:
    gated = any(isinstance(module, (LearnedQuantizer, RankGate)) for module in chain.modules())
    if gated and chain.device.type == "meta":
        raise AdapterError(
            f"Adapter {adapter!r} has no values at {site.weight}: it is on the meta device. Load weights first."
        )
    if isinstance(chain.before, ActivationQuantizer) and not chain.before.seen():
        raise AdapterError(
            f"Adapter {adapter!r} at {site.weight} ({site.role}) rounds its input, and has seen no data to set the range "
            f"from. Train it, or run a batch in training mode, before compacting."
        )
    if gated and isinstance(chain, Stack):
        raise AdapterError(
            f"Adapter {adapter!r} has its own rank and precision for each of the {site.stack} matrices of {site.weight}, and one "
            f"stacked tensor can hold only one. Merge it, or adapt such sites with a method that has no gates."
        )


@torch.no_grad()
def _fill(old: Chain, new: Chain) -> None:
    """Copy the old chain's values into the new one, which keeps the leading entries of each axis."""
    with old.settled():
        for source, target in zip(old.factors, new.factors, strict=True):
            if not isinstance(source, Weighted) or not isinstance(target, Weighted):
                continue
            kept = tuple(slice(n) for n in target.weight.shape)
            target.weight.copy_(_codes(source, target)[kept])
    for learned, fixed in zip(_roundings(old), _roundings(new), strict=True):
        fixed.log_range.copy_(learned.log_range)


def _roundings(chain: Chain) -> list[LearnedQuantizer | FakeQuantizer]:
    """The quantizers of the base weight and of the input."""
    parts = (part for part in (chain.reweight, chain.before) if part is not None)
    return [
        module for part in parts for module in part.modules() if isinstance(module, (LearnedQuantizer, FakeQuantizer))
    ]


def _codes(source: Weighted, target: Weighted) -> Tensor:
    ladder = next((t for t in source.applied if isinstance(t, LearnedQuantizer)), None)
    coded = next((t for t in target.applied if isinstance(t, IntCodes)), None)
    return source.value if coded is None or ladder is None else coded.encode(ladder, source.weight)
