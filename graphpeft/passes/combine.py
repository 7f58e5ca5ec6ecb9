"""Combine: build one plain LoRA adapter from several weighted ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from graphpeft.ambient import plain
from graphpeft.chain import Chain
from graphpeft.errors import AdapterError
from graphpeft.ir.site import Site
from graphpeft.ir.weights import float_weight
from graphpeft.methods.lora import LoRA
from graphpeft.passes.insert import insert
from graphpeft.planning.plan import Entry
from graphpeft.rewrite.adapters import places
from graphpeft.rewrite.delta import update
from graphpeft.rewrite.entry import on_model
from graphpeft.rewrite.fill import fill
from graphpeft.rewrite.naming import check_name
from graphpeft.rewrite.state import chains, get_state, names, refuse_merged
from graphpeft.rewrite.sync import set_active
from graphpeft.rules.rule import parse, to_text
from graphpeft.tracing import as_pass

How = Literal["cat", "linear", "svd", "ties", "dare"]


@dataclass(frozen=True)
class WeightedUpdate:
    """One adapter's update of a site, and its weight in the sum."""

    weight: float
    chain: Chain
    base: Tensor

    def pair(self) -> tuple[Tensor, Tensor]:
        """A `(r, inputs)` and B `(outputs, r)` with B A = ΔW. Raises `AdapterError` if no such pair exists."""
        with self.chain.as_trained():
            a, b = self.chain.to_lora()
        return a.float(), b.float()

    def delta(self, site: Site) -> Tensor:
        """ΔW, `(outputs, inputs)`. Unlike a pair, it exists for every method."""
        with self.chain.as_trained():
            return update(self.chain, self.base, site).float()


@as_pass("combine", "build one adapter from several")
@plain()
@torch.no_grad()
@on_model(adds=True)
def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str,
    how: How = "cat",
    *,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> nn.Module:
    """Add an adapter that combines several others, and activate it; returns the model.

    Args:
        weights: adapters by name, with the factor on each update.
        name: the new adapter's name. It is plain LoRA at every site of the others.
        how: `cat` is exact: the ranks add up. `svd` is the best approximation of the exact sum with rank `rank`. `linear`
            adds the As and the Bs separately, each times √(weight · scale), as PEFT does; it needs equal ranks and is not
            the sum of the updates. `ties` keeps the largest `density` of each update's entries, elects a sign for every
            entry, and averages the entries with that sign (Yadav et al., 2023). `dare` drops entries at random and
            rescales the rest by 1 / density (Yu et al., 2024). Both end with the best approximation of rank `rank`.
        rank: for `svd`, `ties` and `dare`; default: the largest rank among the adapters at the site.
        seed: seed of the random draws of `dare`.

    Raises: `AdapterError`, and changes nothing, for an unknown name, a merged model, tensors on the meta device, unequal
        ranks (`linear`), or an update that is not a LoRA pair (`cat`, `linear`).
    """
    refuse_merged(model, "combine adapters")
    chosen = names(model, tuple(weights))
    check_name(model, name)
    _check(weights, how, density, rank)
    found = _parts(model, weights)
    generator = torch.Generator().manual_seed(seed)
    made: dict[Site, tuple[Tensor, Tensor]] = {}
    for site, parts in found.items():
        made[site] = _pair(site, parts, how, rank, density, generator)
    entries = tuple(
        Entry(site, LoRA(r=a.shape[-2]), f"{site.role}:lora(r={a.shape[-2]})") for site, (a, _) in made.items()
    )
    insert(
        model,
        name,
        _rules(model, chosen, max(e.method.r for e in entries if isinstance(e.method, LoRA))),
        seed,
        entries,
    )
    for site, chain in chains(model, name).items():
        fill(chain, *made[site], site)
    set_active(model, (name,))
    return model


def _check(weights: Mapping[str, float], how: str, density: float, rank: int | None) -> None:
    if not weights:
        raise AdapterError("No adapters are named. Pass weights, such as {'a': 0.5, 'b': 0.5}.")
    if how not in get_args(How):
        raise AdapterError(f"how = {how!r} is not a way to combine adapters. Choose one of {', '.join(get_args(How))}.")
    if wrong := [name for name, weight in weights.items() if not math.isfinite(weight)]:
        raise AdapterError(f"The weight of {wrong[0]!r} is {weights[wrong[0]]}; it must be a finite number.")
    if rank is not None and rank < 1:
        raise AdapterError(f"rank = {rank} is not a rank. Give 1 or more.")
    if not 0 < density <= 1:
        raise AdapterError(f"density = {density} is not a share of entries. Give a number above 0 and at most 1.")


def _parts(model: nn.Module, weights: Mapping[str, float]) -> dict[Site, list[WeightedUpdate]]:
    """The updates of each site, in the order of the names."""
    found: dict[Site, list[WeightedUpdate]] = {}
    sites: dict[str, Site] = {}
    for name, weight in weights.items():
        for site, chain in chains(model, name).items():
            if chain.device.type == "meta":
                raise AdapterError(f"Adapter {name!r} has no values at {site.weight}: it is on the meta device.")
            known = sites.setdefault(site.key, site)
            if {place.weight for place in places(known)} != {place.weight for place in places(site)}:
                raise AdapterError(
                    f"{site.weight} ({site.role}) is tied for one of the adapters and not for {name!r}, so no single update "
                    f"can replace both. Activate them together instead: gp.activate(model, weights)."
                )
            found.setdefault(known, []).append(WeightedUpdate(float(weight), chain, float_weight(model, site.weight)))
    return found


def _pair(
    site: Site, parts: Sequence[WeightedUpdate], how: How, rank: int | None, density: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A and B of the combined update."""
    if how in {"cat", "linear"}:
        try:
            pairs = [part.pair() for part in parts]
        except AdapterError as error:
            raise AdapterError(f"{site.weight} ({site.role}): {error} Or combine with how='svd'.") from error
        return _joined(parts, pairs) if how == "cat" else _added(site, parts, pairs)
    deltas = torch.stack([part.delta(site) for part in parts])
    scales = torch.tensor([part.weight for part in parts]).view(-1, *(1 for _ in deltas.shape[1:]))
    if how == "ties":
        total = _elected(_largest(deltas, density), scales)
    else:
        kept = torch.rand(deltas.shape, generator=generator) < density if how == "dare" else 1.0
        total = (deltas * kept * scales).sum(0) / (density if how == "dare" else 1.0)
    limit = min(total.shape[-2:])
    return _nearest(total, min(rank or max(part.chain.rank for part in parts), limit))


def _joined(parts: Sequence[WeightedUpdate], pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    scaled = [part.weight * b for part, (_, b) in zip(parts, pairs, strict=True)]
    return torch.cat([a for a, _ in pairs], -2), torch.cat(scaled, -1)


def _added(
    site: Site, parts: Sequence[WeightedUpdate], pairs: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    if len({a.shape for a, _ in pairs}) > 1:
        ranks = ", ".join(str(a.shape[-2]) for a, _ in pairs)
        raise AdapterError(
            f"{site.weight} ({site.role}): ranks {ranks} cannot be added. Combine with how='cat' or 'svd'."
        )
    # B already contains the scale. As in PEFT, A and B each get the square root of weight · scale.
    scales = [abs(part.chain.scale) or 1.0 for part in parts]
    ups = [(abs(part.weight) * scale) ** 0.5 for part, scale in zip(parts, scales, strict=True)]
    downs = [math.copysign(up / scale, part.weight) for part, up, scale in zip(parts, ups, scales, strict=True)]
    a = sum(up * a for up, (a, _) in zip(ups, pairs, strict=True))
    b = sum(down * b for down, (_, b) in zip(downs, pairs, strict=True))
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    return a, b


def _largest(deltas: Tensor, density: float) -> Tensor:
    """Each update with only the fraction `density` of its entries that is largest in magnitude; the rest is zero."""
    flat = deltas.flatten(1).abs()
    count = max(int(density * flat.shape[1]), 1)
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, flat.topk(count, 1).indices, True)
    return deltas * kept.view_as(deltas)


def _elected(deltas: Tensor, scales: Tensor) -> Tensor:
    """The weighted mean, entry by entry, of the updates whose sign agrees with the sign of the sum."""
    agree = torch.sign(deltas) == torch.sign(deltas.sum(0))
    agree &= deltas != 0
    return (deltas * scales * agree).sum(0) / agree.sum(0).clamp_min(1)


def _nearest(total: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The pair of this rank whose product is nearest (Eckart and Young); each side gets √s of the singular values."""
    u, s, v = torch.linalg.svd(total, full_matrices=False)
    root = s[..., :rank].sqrt()
    return root.unsqueeze(-1) * v[..., :rank, :], u[..., :rank] * root.unsqueeze(-2)


def _rules(model: nn.Module, chosen: Sequence[str], rank: int) -> str:
    """The rules of all the adapters, with plain LoRA as the method: they select the new adapter's sites."""
    rules = [rule for name in chosen for rule in parse(get_state(model).adapters[name].rules)]
    made = {str(rule): rule for rule in (replace(rule, method=LoRA(r=rank), options=("r",)) for rule in rules)}
    return to_text(made.values())
