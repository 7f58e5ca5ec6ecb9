"""Merge and un-merge. Un-merging restores copies of the original weights; it subtracts nothing, so it rounds nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from graphpeft.ambient import plain
from graphpeft.compat.accelerate import offloaded
from graphpeft.compat.quantized import library
from graphpeft.compat.sharded import full_tensor, gathered, shard_like
from graphpeft.errors import AdapterError
from graphpeft.ir.site import Site
from graphpeft.ir.weights import float_weight, get_parameter
from graphpeft.rewrite.delta import add_delta, update
from graphpeft.rewrite.requantize import Requantized, Rounding, refuse_quantized, requantized
from graphpeft.rewrite.state import Merge, branches, chains, get_state, names, refuse_merged
from graphpeft.rewrite.sync import changing, sync
from graphpeft.rewrite.tied import refuse_tied
from graphpeft.tracing import as_pass


@as_pass("merge", "fold adapters into the weights")
@plain()
def merge(model: nn.Module, name: str | Sequence[str] | None = None, *, requantize: Any = None) -> Requantized | None:
    """Fold adapters (by default the active ones) into the weights, in place.

    W + ΔW is summed in float32 or wider and cast to the weight's dtype last. Afterwards the model is plain: its own
    classes, no extra parameters. The original weights are kept, so that `unmerge` restores them bit for bit.

    Merging into a quantized weight rounds it again, so that is refused unless `requantize` is the torchao config that
    the weights were quantized with. The rounding error is then returned; it prints as a table.

    Raises `AdapterError`, and changes nothing, if the model is already merged, an adapter is unknown, ΔW is not finite,
    a weight is tied to one that the adapter does not adapt, or a weight is quantized and cannot be requantized.
    """
    state = get_state(model)
    refuse_merged(model, "merge")
    folded = tuple(state.active) if name is None else names(model, name if isinstance(name, str) else tuple(name))
    if not folded:
        raise AdapterError("No adapter is active, so there is nothing to merge. Name one: gp.merge(model, 'default').")
    _refuse_quantized(model, folded, requantize)
    for adapter in folded:
        for site, chain in chains(model, adapter).items():
            refuse_tied(model, site)
            _refuse_offloaded(model, site)
            chain.require_linear(f"{adapter!r} cannot be folded into {site.weight} ({site.role})")
    with gathered(model, branches(model, *folded)):
        updated = _updated(model, folded)
    weights = {e.site.weight: get_parameter(model, e.site.weight) for a in state.adapters.values() for e in a.entries}
    lost: dict[nn.Parameter, Rounding] = {}
    for path, parameter in weights.items():
        if parameter in updated and parameter not in lost and library(parameter):
            total = updated[parameter]
            updated[parameter], lost[parameter] = requantized(path, parameter.detach(), total, requantize)
    _refuse_overflow(weights, updated)
    _write(model, folded, weights, updated)
    return Requantized(tuple(lost.values())) if requantize is not None else None


def _write(
    model: nn.Module,
    folded: tuple[str, ...],
    weights: Mapping[str, nn.Parameter],
    updated: Mapping[nn.Parameter, torch.Tensor],
) -> None:
    """Make the model plain and write the new values, or leave it as it was.

    This works like a write-ahead log: the originals are recorded before the first change. Whatever interrupts the work, `sync`
    then finds a merge that is not complete and puts them back.
    """
    before = {parameter: parameter.detach().clone() for parameter in updated}
    originals = {path: before[parameter] for path, parameter in weights.items() if parameter in before}
    with changing(model) as state:
        state.__dict__.update(merge=Merge(folded, originals), attached=False)
        try:
            for parameter, value in updated.items():
                parameter.data.copy_(value)  # rounds once, to the weight's own dtype
            state.merge = Merge(folded, originals, complete=True)
        except BaseException:
            sync(model)
            raise


@torch.no_grad()
def _updated(model: nn.Module, folded: Sequence[str]) -> dict[nn.Parameter, torch.Tensor]:
    """The new value of every weight, in float32 or wider, sharded as the weight is."""
    updated: dict[nn.Parameter, torch.Tensor] = {}
    for adapter in folded:
        for site, chain in chains(model, adapter).items():
            parameter = get_parameter(model, site.weight)
            base = float_weight(model, site.weight)
            weight = full_tensor(updated.get(parameter, base))
            wide = torch.promote_types(weight.dtype, torch.float32)
            with chain.settled():
                delta = _finite(update(chain, base, site), adapter, site)
            updated[parameter] = shard_like(add_delta(weight.to(wide), site, delta), parameter)
    return updated


@as_pass("unmerge", "restore the weights from before the merge")
@plain()
def unmerge(model: nn.Module) -> None:
    """Restore every weight from before `merge`, bit for bit, and reactivate the adapters that were active then."""
    state = get_state(model)
    if not state.merged:
        raise AdapterError(f"Nothing is merged into {type(model).__name__}. gp.merge(model) folds the active adapters.")
    assert state.merge is not None
    state.__dict__.update(merge=replace(state.merge, complete=False), pending=True)
    try:
        sync(model)
    except BaseException:
        sync(model)
        raise


def _refuse_overflow(weights: Mapping[str, nn.Parameter], updated: Mapping[nn.Parameter, torch.Tensor]) -> None:
    """Raise if a sum that is finite in float32 overflows in the weight's own dtype."""
    for path, parameter in weights.items():
        total = updated.get(parameter)
        if total is not None and not library(parameter) and not torch.isfinite(total.to(parameter.dtype)).all():
            raise AdapterError(
                f"{path} plus the update has NaN or infinite values in {str(parameter.dtype).removeprefix('torch.')}; the "
                f"model is unchanged. Usually the update is too large for half precision. Merge in float32, or train it again."
            )


def _refuse_quantized(model: nn.Module, folded: Sequence[str], config: Any) -> None:
    known: dict[str, list[str]] = {}
    for site in (site for adapter in folded for site in chains(model, adapter)):
        whose = library(get_parameter(model, site.weight))
        if whose == "bitsandbytes" or (whose and config is None):
            known.setdefault(whose, []).append(site.weight)
    for made_by, weights in known.items():
        refuse_quantized(weights, made_by)


def _finite(delta: torch.Tensor, adapter: str, site: Site) -> torch.Tensor:
    if not torch.isfinite(delta).all():
        raise AdapterError(
            f"The update of adapter {adapter!r} at {site.weight} ({site.role}) has NaN or infinite values; the model is "
            f"unchanged. Usually training diverged: load an earlier checkpoint or lower the learning rate."
        )
    return delta


def _refuse_offloaded(model: nn.Module, site: Site) -> None:
    if offloaded(model.get_submodule(site.weight.rpartition(".")[0])):
        raise AdapterError(
            f"{site.weight} is offloaded: accelerate keeps its values elsewhere and would not see the change. Save the adapter "
            f"and merge it on disk, with gp.merge_files or `graphpeft merge`, or load the model without offloading."
        )
