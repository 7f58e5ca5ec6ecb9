"""Merge and un-merge. Un-merging restores copies of the original weights; it subtracts nothing, so it rounds nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import nn

from graphpeft.ambient import plain
from graphpeft.chain import Chain
from graphpeft.compat.accelerate import offloaded
from graphpeft.compat.quantized import library
from graphpeft.compat.sharded import full_tensor, gathered, shard_like
from graphpeft.compat.tensors import version
from graphpeft.errors import AdapterError
from graphpeft.ir.site import Site
from graphpeft.ir.weights import float_weight, get_parameter
from graphpeft.rewrite.delta import add_delta, update
from graphpeft.rewrite.entry import entered, on_model
from graphpeft.rewrite.requantize import Requantized, Rounding, refuse_quantized, requantized
from graphpeft.rewrite.state import (
    AdapterSet,
    Merge,
    branches,
    chains,
    find_state,
    get_state,
    names,
    refuse_inside,
    refuse_merged,
)
from graphpeft.rewrite.sync import changing, finish, sync
from graphpeft.rewrite.tied import refuse_tied
from graphpeft.tracing import as_pass

M = TypeVar("M", bound=nn.Module)


@as_pass("merge", "fold adapters into the weights")
@plain()
@on_model()
def merge(
    model: nn.Module,
    name: str | Sequence[str] | None = None,
    *,
    requantize: Any = None,
    keep: bool = True,
) -> Requantized | None:
    """Fold adapters (by default the active ones) into the weights, in place.

    W + ΔW is summed in float32 or wider and cast to the weight's dtype last, weight by weight. Afterwards the model is plain: its
    own classes, no extra parameters. The original weights are kept, so that `unmerge` restores them bit for bit. An adapter
    that is merged into a model with others merged joins them.

    Args:
        name: one adapter or several.
        requantize: the torchao config that quantized weights were made with. Merging rounds them again, so it is refused
            without this; the rounding error is then returned, and prints as a table.
        keep: whether to keep the adapters and the original weights. With `False` the merge is final: all adapters are removed,
            also those that are not merged, no memory is taken, and the model can be adapted anew.

    Raises `AdapterError`, and changes nothing, if the adapters are already merged, one is unknown, ΔW is not finite,
    a weight is tied to one that the adapter does not adapt, or a weight is quantized and cannot be requantized.
    """
    state = get_state(model)
    refuse_inside(model, "merge")
    folded = tuple(state.active) if name is None else names(model, name if isinstance(name, str) else tuple(name))
    before = state.merged
    if before and (name is None or not set(folded) - set(before)):
        if keep:
            refuse_merged(model, "merge")
        finish(model, _drop)
        return None
    if not folded:
        raise AdapterError("No adapter is active, so there is nothing to merge. Name one: gp.merge(model, 'default').")
    if before:
        unmerge(model)
    try:
        return _merged(model, tuple(dict.fromkeys((*before, *folded))), requantize, keep)
    except Exception:
        if before:
            _merged(model, before, requantize, keep=True)
        raise


def merge_and_unload(model: M, name: str | Sequence[str] | None = None) -> M:
    """Merge for good, and return the plain model: `merge(model, name, keep=False)`, by the name that PEFT gives it."""
    merge(model, name, keep=False)
    return cast(M, entered(model, "merge"))


@dataclass(frozen=True)
class Part:
    """One weight, its names, and the branches that are folded into it."""

    parameter: nn.Parameter
    paths: tuple[str, ...]
    updates: tuple[tuple[str, Site, Chain], ...]


def _merged(model: nn.Module, folded: tuple[str, ...], requantize: Any, keep: bool) -> Requantized | None:
    _refuse_quantized(model, folded, requantize)
    for adapter in folded:
        for site, chain in chains(model, adapter).items():
            refuse_tied(model, site)
            _refuse_offloaded(model, site)
            chain.require_linear(f"{adapter!r} cannot be folded into {site.weight} ({site.role})")
    lost: dict[str, Rounding] = {}
    with gathered(model, branches(model, *folded)):
        parts = _parts(model, folded)
        if keep:
            _fold(model, folded, parts, requantize, lost)
        else:
            _fold_for_good(model, parts, requantize, lost)
    return Requantized(tuple(lost.values())) if requantize is not None else None


def _parts(model: nn.Module, folded: Sequence[str]) -> list[Part]:
    paths: dict[nn.Parameter, list[str]] = {}
    for adapter in get_state(model).adapters.values():
        for entry in adapter.entries:
            held = paths.setdefault(get_parameter(model, entry.site.weight), [])
            held += [] if entry.site.weight in held else [entry.site.weight]
    updates: dict[nn.Parameter, list[tuple[str, Site, Chain]]] = {}
    for name in folded:
        for site, chain in chains(model, name).items():
            updates.setdefault(get_parameter(model, site.weight), []).append((name, site, chain))
    return [Part(parameter, tuple(paths[parameter]), tuple(found)) for parameter, found in updates.items()]


def _fold(
    model: nn.Module, folded: tuple[str, ...], parts: Sequence[Part], requantize: Any, lost: dict[str, Rounding]
) -> None:
    """Write the new values and keep the old ones, or leave the model as it was.

    This works like a write-ahead log: each original is recorded before it is overwritten. Whatever interrupts the work, `sync`
    then finds a merge that is not complete and puts them back.
    """
    with changing(model) as state:
        merge = Merge(folded, {})
        state.__dict__.update(merge=merge, attached=False)
        try:
            for part in parts:
                value = _value(model, part, requantize, lost)
                original = part.parameter.detach().clone()
                merge.originals.update(dict.fromkeys(part.paths, original))
                part.parameter.data.copy_(value)  # rounds once, to the weight's own dtype
            versions = {path: version(part.parameter) for part in parts for path in part.paths}
            state.merge = replace(merge, versions=versions, complete=True)
        except BaseException:
            sync(model)
            raise


def _fold_for_good(model: nn.Module, parts: Sequence[Part], requantize: Any, lost: dict[str, Rounding]) -> None:
    """Write the new values without copies of the old ones.

    Nothing could be put back, so all values are checked before the first is written, and the work is then finished, whatever
    interrupts it. A value is noted before it is written, and only then the next one is computed: to write it again is harmless.
    """
    for part in parts:
        _value(model, part, requantize, lost)
    noted: dict[str, Any] = {"at": 0, "value": None}

    def work(root: nn.Module, state: AdapterSet) -> None:
        while noted["at"] < len(parts):
            part = parts[noted["at"]]
            if noted["value"] is None:
                noted["value"] = _value(root, part, requantize, {})
            part.parameter.data.copy_(noted["value"])
            noted.update(at=noted["at"] + 1, value=None)

    finish(model, work, _drop)


def _drop(_: nn.Module, state: AdapterSet) -> None:
    """Forget the adapters and what un-merging would need."""
    state.__dict__.update(adapters={}, active={}, merge=None, rows=None)


@torch.no_grad()
def _value(model: nn.Module, part: Part, requantize: Any, lost: dict[str, Rounding]) -> torch.Tensor:
    """The new value of a weight, in float32 or wider, sharded as the weight is. Raises `AdapterError` if it is not finite."""
    path = part.paths[0]
    base = float_weight(model, path)
    total = full_tensor(base).to(torch.promote_types(base.dtype, torch.float32))
    for adapter, site, chain in part.updates:
        with chain.settled():
            total = add_delta(total, site, _finite(update(chain, base, site), adapter, site))
    if library(part.parameter):
        value, lost[path] = requantized(path, part.parameter.detach(), total, requantize)
        return value
    if not torch.isfinite(total.to(part.parameter.dtype)).all():
        raise AdapterError(
            f"{path} plus the update has NaN or infinite values in {str(part.parameter.dtype).removeprefix('torch.')}; the "
            f"model is unchanged. Usually the update is too large for half precision. Merge in float32, or train it again."
        )
    return shard_like(total, part.parameter)


@as_pass("unmerge", "restore the weights from before the merge")
@plain()
def unmerge(model: nn.Module, *, force: bool = False) -> None:
    """Restore every weight from before `merge`, bit for bit, and reactivate the adapters that were active then.

    Raises `AdapterError` if nothing is merged, or if a merged weight was changed since, as by training or `load_state_dict`:
    the old values would replace the new ones. `force` does that.
    """
    known = find_state(model)
    begun = known is not None and known.merge is not None and known.pending
    model = entered(model, "unmerge", intact=False)
    state = get_state(model)
    if begun and state.merge is None:  # an interrupted call, which was just finished
        return
    if state.merge is None:
        raise AdapterError(f"Nothing is merged into {type(model).__name__}. gp.merge(model) folds the active adapters.")
    if not force:
        _refuse_changed(model, state.merge)
    finish(model, _reopen)


def _reopen(_: nn.Module, state: AdapterSet) -> None:
    if state.merge is not None:
        state.merge = replace(state.merge, complete=False)


@torch.no_grad()
def _refuse_changed(model: nn.Module, merge: Merge) -> None:
    """A weight that was written to is compared with the sum that the merge wrote, which is made again."""
    for part in _parts(model, merge.names):
        path, parameter = part.paths[0], part.parameter
        writes = (
            getattr(model.get_submodule(path.rpartition(".")[0]), "max_norm", None) is not None
        )  # by itself, in each pass
        if writes or library(parameter) or merge.versions.get(path) == version(parameter):
            continue
        original = full_tensor(merge.originals[path])
        total = original.to(torch.promote_types(original.dtype, torch.float32))
        for _, site, chain in part.updates:
            with chain.settled():
                total = add_delta(total, site, update(chain, original, site))
        if not torch.equal(total.to(parameter.dtype), full_tensor(parameter.detach())):
            raise AdapterError(
                f"{path} was changed after the merge, usually by training or load_state_dict: un-merging would put the old "
                f"weights over the new ones. Make the merge final with gp.merge(model, keep=False), or un-merge all the same "
                f"with gp.unmerge(model, force=True)."
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
