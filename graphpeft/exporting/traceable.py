"""Prepare a model with adapter slots for tracing, in one of two forms: LoRA pairs of any rank, for every method that equals
an exact pair; or one method's own trained tensors, with everything that it draws from the seed inside the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from graphpeft.errors import ExportError
from graphpeft.exporting.slots import SlotBranch, inserted, lora_pairs, named, slot_at
from graphpeft.ir.weights import get_parameter
from graphpeft.rewrite.state import chains, get_state, saved
from graphpeft.rewrite.sync import opened
from graphpeft.runtime.layout import AdapterInput, Arrays, NativeSlot, Pairs, Slot, a_of, b_of, filled

Fill = Callable[[Sequence[AdapterInput]], Arrays]
"""A function from a graph's slots to an adapter's tensors for them."""


@dataclass
class TraceableModel:
    """Slots, the model's tensors that stand for their inputs during tracing, and the adapters' tensors."""

    slots: tuple[AdapterInput, ...]
    fed: Mapping[str, Tensor]
    adapters: Mapping[str, Fill]
    ranks: Mapping[str, Mapping[str, int]]


@contextmanager
def as_pairs(model: nn.Module, names: Sequence[str]) -> Iterator[TraceableModel]:
    """The base model with an empty A/B pair at every adapted weight.

    Raises:
        ExportError: an adapter does not equal a LoRA pair.
    """
    adapters = {name: chains(model, name) for name in names}
    sites = {site.weight: site for found in adapters.values() for site in found}
    slots = {weight: slot_at(site, f"rank_{i}") for i, (weight, site) in enumerate(sites.items())}
    pairs = {name: _arrays(model, name, lora_pairs(found)) for name, found in adapters.items()}
    branches = {site: SlotBranch(slots[weight], get_parameter(model, weight)) for weight, site in sites.items()}
    fed: dict[str, Tensor] = {}
    for site, branch in branches.items():
        fed |= {a_of(named(site.weight)): branch.A, b_of(named(site.weight)): branch.B}
    with inserted(model, branches):
        yield TraceableModel(
            tuple(slots.values()), fed,
            {name: partial(filled, pairs=found) for name, found in pairs.items()},
            {name: {site: a.shape[1] for site, (a, _) in found.items()} for name, found in pairs.items()},
        )  # fmt: skip


@contextmanager
def as_trained(model: nn.Module, names: Sequence[str]) -> Iterator[TraceableModel]:
    """The model with its first adapter, whose stored tensors become inputs; the other adapters must match it.

    Raises:
        ExportError: the adapters differ in sites, method, options or seed, or zeros in an adapter's tensors would not
            give a zero update.
    """
    held = {name: dict(_held(model, name)) for name in names}
    first = held[names[0]]
    for name in names[1:]:
        _require_alike(model, names[0], name)
    for name, key, tensor in (
        (n, k, t) for n, found in held.items() for keys in found.values() for k, t in keys.items()
    ):
        _require_finite(tensor.detach(), f"{key} of adapter {name!r}")
    values = {name: {key: t.detach().cpu().numpy() for keys in found.values() for key, t in keys.items()}
              for name, found in held.items()}  # fmt: skip
    slots = tuple(
        NativeSlot(site, tuple((key, tuple(t.shape)) for key, t in keys.items())) for site, keys in first.items()
    )
    strengths = {
        name: strength for name, strength in get_state(model).active.items() if name in names and strength != 1
    }
    if strengths:
        raise ExportError(
            f"Adapter {next(iter(strengths))!r} is active at strength {next(iter(strengths.values())):g}, which its own tensors "
            f"do not hold. Activate it at strength 1, or export without compact."
        )
    with opened(model, "", (names[0],)):
        yield TraceableModel(
            slots, {key: tensor for keys in first.values() for key, tensor in keys.items()},
            {name: partial(_own, values=found) for name, found in values.items()},
            {name: {} for name in names},
        )  # fmt: skip


def _held(model: nn.Module, name: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    seen: set[str] = set()
    for site, chain in chains(model, name).items():
        what = "an update relative to the base weight" if chain.needs_base_weight else "a transform of the site's input"
        if chain.needs_base_weight or chain.before is not None:
            raise ExportError(
                f"{site.weight}: adapter {name!r} is {what}, which zeros in its tensors do not disable. Export without compact, "
                "or with merged=True."
            )
        if site.tied or site.stack:
            raise ExportError(f"{site.weight} is tied or stacked, and cannot have a slot. Export it with merged=True.")
        keys = {key: tensor for key, tensor in saved(site, chain) if key not in seen}
        seen |= keys.keys()
        yield site.key, keys


def _require_alike(model: nn.Module, one: str, other: str) -> None:
    adapters = get_state(model).adapters
    first, second = adapters[one], adapters[other]
    pairs = list(zip(first.entries, second.entries, strict=False))
    strange = next((f"{b.method} at {b.site.weight}, not {a.method} at {a.site.weight}"
                    for a, b in pairs if (a.site, a.method) != (b.site, b.method)), None)  # fmt: skip
    if strange is None and len(first.entries) != len(second.entries):
        strange = f"{len(second.entries)} sites, not {len(first.entries)}"
    if strange is None and first.seed != second.seed:
        strange = f"the seed {second.seed}, not {first.seed}"
    if strange:
        raise ExportError(
            f"compact=True: adapter {other!r} has {strange} as {one!r}. One graph holds the random tensors of one method and "
            "seed. Export them to two folders, or without compact, as LoRA pairs."
        )


def _arrays(model: nn.Module, adapter: str, lowered: Mapping[str, tuple[Tensor, Tensor]]) -> Pairs:
    found = {}
    for weight, (a, b) in lowered.items():
        dtype = get_parameter(model, weight).dtype
        pair = a.to(dtype), b.to(dtype)
        for side, tensor in zip("AB", pair, strict=True):
            _require_finite(tensor, f"{side} of adapter {adapter!r} at {weight}")
        found[named(weight)] = (_numpy(pair[0]), _numpy(pair[1]))
    return found


def _require_finite(tensor: Tensor, name: str) -> None:
    if not torch.isfinite(tensor).all():
        raise ExportError(
            f"{name} has NaN or infinite values in {str(tensor.dtype).removeprefix('torch.')}; nothing was written. Usually "
            f"training diverged, or half precision is too narrow for it. Load an earlier checkpoint, or export in float32."
        )


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().numpy()


def _own(places: Sequence[AdapterInput], values: Arrays) -> Arrays:
    return {name: values[name] for place in places for name in place.shapes}


def probes(places: Sequence[AdapterInput], fed: Mapping[str, Tensor]) -> Iterator[tuple[str, Arrays, Arrays]]:
    """Random contents for each site's slot alone: the site, values for PyTorch's tensors, and values for the graph."""
    random = np.random.default_rng(0)
    for place in places:
        if isinstance(place, Slot):
            for site, outputs in place.members:
                dtype = _numpy(fed[a_of(site)][:0]).dtype
                a = (random.standard_normal((place.inputs, 3)) / place.inputs**0.5).astype(dtype)
                b = random.standard_normal((3, outputs)).astype(dtype)
                yield site, {a_of(site): a, b_of(site): b}, filled(places, {site: (a, b)})
        else:
            values = {name: _random(random, fed[name]) for name in place.shapes}
            yield place.site, values, values


def _random(random: np.random.Generator, like: Tensor) -> np.ndarray:
    values = random.standard_normal(tuple(like.shape))
    if not like.is_floating_point():
        values = (values * 2).round().clip(-3, 3)
    return values.astype(_numpy(like[:0] if like.ndim else like).dtype)


def absent(name: str, like: Tensor, places: Sequence[AdapterInput]) -> Tensor:
    """The tensor that stands for an empty slot in PyTorch: zeros, or rank 0."""
    if any(isinstance(place, NativeSlot) and name in place.shapes for place in places):
        return torch.zeros_like(like)
    return like[:, :0] if name.endswith(".lora_A.weight") else like[:0]
