"""Write an adapter that gives the same outputs in PEFT: LoRA of whole weights, DoRA, or VeRA.

PEFT adapts a fused weight as a whole: its sites are written as one LoRA whose rank is their sum, zero in all other rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isclose, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphpeft.chain import Chain, Diag, Magnitude, Projection, Weighted
from graphpeft.errors import AdapterError
from graphpeft.ir.site import Site
from graphpeft.ir.weights import as_out_in, weight_layout
from graphpeft.methods.dora import DoRA
from graphpeft.methods.lora import LoRA
from graphpeft.methods.vera import VeRA
from graphpeft.planning.plan import Entry
from graphpeft.rewrite.adapters import places
from graphpeft.rewrite.state import base_weight, chains, get_state
from graphpeft.store.finite import odd_tensors, warn_of
from graphpeft.store.peft.config import pattern, selection
from graphpeft.store.peft.files import PAIR, packed
from graphpeft.store.peft.layout import BANK, NoEquivalent, PeftWeight, bare, modules, nesting, place

INSTEAD = "Save it in graphpeft's own format, or merge it: gp.merge(model)."


@dataclass(frozen=True)
class Pair:
    """The update of a whole weight, scale · B · A; rows of B outside of sites are zero."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def r(self) -> int:
        return self.a.shape[-2]


def write_peft(model: nn.Module, name: str, folder: Path) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`, so that a kill at any moment leaves the old or the new.

    Raises `AdapterError`, before anything is written, if PEFT's format cannot hold the update of a site, which it names.
    """
    if isinstance(model, fx.GraphModule):
        raise AdapterError(
            f"PEFT adapts modules, and {type(model).__name__} is one graph. Save in graphpeft's own format, load it on the "
            f"model that was exported, and save from there."
        )
    entries, found = get_state(model).adapters[name].entries, chains(model, name)
    for site, chain in found.items():
        if chain.device.type == "meta":
            raise AdapterError(f"Adapter {name!r} has no values at {site.weight}: it is on the meta device.")
    spots = _spots(model, entries)
    with torch.no_grad():
        if _is_vera(entries, spots):
            tensors, config = _vera(entries, found, spots)
        else:
            tensors, config = _lora(model, entries, found, spots)
    data = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
    names = [target for target, _ in modules(model)]
    targets = {spot.target for listed in spots.values() for spot in listed if spot.kind != "parameter"}
    config = {**_about(model), **config, "target_modules": selection(targets, names) if targets else []}
    head = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    warn_of(odd_tensors(data), folder, "They are saved as they are.", stacklevel=8)
    PAIR.write(folder, head, packed(data, head))


def _about(model: nn.Module) -> dict[str, Any]:
    base = getattr(model, "base_class", type(model))
    return {
        "auto_mapping": {"base_model_class": base.__name__, "parent_library": base.__module__},
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "bias": "none",
        "inference_mode": True,
        "modules_to_save": None,
        "task_type": None,
    }


def _spots(model: nn.Module, entries: Sequence[Entry]) -> dict[str, list[PeftWeight]]:
    """The places where PEFT adapts each weight: several for a tied one."""
    sites = [each for entry in entries for each in places(entry.site)]
    loose = {s.weight for s in sites if bare(model.get_submodule(s.weight.rpartition(".")[0]), _leaf(s.weight))}
    nested, found = nesting(model, loose), {}
    for entry in entries:
        try:
            found[entry.site.weight] = [place(model, each, nested) for each in places(entry.site)]
        except NoEquivalent as error:
            raise _refusal(entry.site, str(error)) from error
    return found


def _leaf(weight: str) -> str:
    return weight.rpartition(".")[2]


def _refusal(site: Site, why: str) -> AdapterError:
    return AdapterError(f"{_held_back(site)}: {why}. {INSTEAD}")


def _held_back(site: Site) -> str:
    return f"PEFT's format cannot hold the adapter of {site.weight} ({site.role})"


# -- LoRA and DoRA -----------------------------------------------------------------------------------------------------


def _lora(
    model: nn.Module, entries: Sequence[Entry], found: Mapping[Site, Chain], spots: Mapping[str, list[PeftWeight]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by key, and the config."""
    dora = _is_dora(entries)
    dropout = _dropout(found, spots)
    pairs: dict[str, Pair] = {}
    for entry in entries:
        if dora and any(spot.kind not in ("linear", "conv") for spot in spots[entry.site.weight]):
            raise _refusal(entry.site, "PEFT's DoRA differs for tables and does not exist for bare parameters")
        pair = _pair(model, entry, found[entry.site], dora)
        before = pairs.get(entry.site.weight)
        pairs[entry.site.weight] = pair if before is None else _beside(before, pair, entry.site)
    rslora = all(isinstance(entry.method, (LoRA, DoRA)) and entry.method.rslora for entry in entries)
    tensors: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for weight, pair in pairs.items():
        for spot in spots[weight]:
            tensors |= spot.laid(pair.a, pair.b, pair.magnitude)
            ranks[spot.target], alphas[spot.target] = pair.r, _alpha(pair.scale * (sqrt(pair.r) if rslora else pair.r))
    (r, rank_pattern), (alpha, alpha_pattern) = pattern(ranks), pattern(alphas)
    config = {
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": rank_pattern,
        "lora_alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "use_dora": dora,
        "init_lora_weights": True,
        "fan_in_fan_out": any(e.site.transposed and not _loose(spots[e.site.weight]) for e in entries),
    }
    loose = sorted(spot.target for listed in spots.values() for spot in listed if spot.kind == "parameter")
    return tensors, config | ({"target_parameters": loose} if loose else {})


def _loose(listed: Iterable[PeftWeight]) -> bool:
    return any(spot.kind == "parameter" for spot in listed)


def _pair(model: nn.Module, entry: Entry, chain: Chain, dora: bool) -> Pair:
    """One site's pair, extended to all rows of the weight."""
    with chain.as_trained():
        if type(entry.method) in (LoRA, DoRA):
            left, right = list(chain.factors)[-2:]
            assert isinstance(left, Weighted)
            assert isinstance(right, Weighted)
            a, b, scale = right.value, _tall(left.value, entry.site), chain.scale
        else:
            try:
                (a, b), scale = chain.to_lora(), 1.0
            except AdapterError as error:
                raise AdapterError(f"{_held_back(entry.site)}: {error}") from error
        pair = Pair(a.to(chain.dtype), b.to(chain.dtype), scale)
        return replace(pair, magnitude=_magnitude(model, entry.site, chain)) if dora else pair


def _tall(b: Tensor, site: Site) -> Tensor:
    """B extended to all rows of the weight, with zeros outside of the site."""
    if site.rows is None:
        return b
    whole = b.new_zeros(*b.shape[:-2], site.full, b.shape[-1])
    whole[..., _index(site), :] = b
    return whole


def _index(site: Site) -> list[int]:
    return [row for run in site.rows or ((0, site.outputs),) for row in range(*run)]


def _magnitude(model: nn.Module, site: Site, chain: Chain) -> Tensor:
    """DoRA's magnitudes for all rows of the weight; rows outside of the site keep their norms from the base."""
    weight = base_weight(model, site.weight)
    whole = replace(site, rows=None, shape=(site.full or site.outputs, site.inputs))
    lengths = torch.linalg.vector_norm(as_out_in(weight, *weight_layout(whole)).to(chain.dtype), dim=-1)
    assert isinstance(chain.reweight, Magnitude)
    lengths[_index(site)] = chain.reweight.magnitude.value
    return lengths


def _beside(one: Pair, other: Pair, site: Site) -> Pair:
    """Join the pairs of two sites of a fused weight into one block-structured pair; the ranks add up."""
    scale = one.scale if one.scale == other.scale else 1.0
    a = torch.cat([one.a, other.a], -2)
    b = torch.cat([one.b * (one.scale / scale), other.b * (other.scale / scale)], -1)
    if one.magnitude is None or other.magnitude is None:
        return Pair(a, b, scale)
    lengths = one.magnitude.clone()
    lengths[_index(site)] = other.magnitude[_index(site)]
    return Pair(a, b, scale, lengths)


def _alpha(alpha: float) -> float:
    """Alpha as an integer if it is one up to rounding, as in PEFT's own configs."""
    return round(alpha) if isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _is_dora(entries: Sequence[Entry]) -> bool:
    plain = [entry for entry in entries if not isinstance(entry.method, DoRA)]
    if plain and len(plain) < len(entries):
        raise _refusal(
            plain[0].site,
            f"`{plain[0].method}` is mixed with `dora`, and PEFT's use_dora applies to a whole adapter",
        )
    return not plain


def _dropout(found: Mapping[Site, Chain], spots: Mapping[str, list[PeftWeight]]) -> float:
    """The adapter's single dropout probability. Tables are ignored: neither library applies dropout to them."""
    by = {site: chain.probability for site, chain in found.items() if spots[site.weight][0].kind != "embedding"}
    if len(set(by.values())) > 1:
        site = min(by, key=lambda each: by[each])
        others = ", ".join(f"{p:g}" for p in sorted({p for p in by.values() if p != by[site]}))
        raise _refusal(site, f"its dropout is {by[site]:g} and other sites have {others}, but PEFT has one for all")
    return next(iter(by.values()), 0.0)


# -- VeRA --------------------------------------------------------------------------------------------------------------


def _is_vera(entries: Sequence[Entry], spots: Mapping[str, list[PeftWeight]]) -> bool:
    """Whether PEFT's VeRA can hold it: one r and key, whole weights of linear maps. If not, it is written as LoRA."""
    methods = {replace(e.method, store="key") if isinstance(e.method, VeRA) else e.method for e in entries}
    plain = all(e.site.rows is None and [s.kind for s in spots[e.site.weight]] == ["linear"] for e in entries)
    return plain and len(methods) == 1 and isinstance(next(iter(methods)), VeRA)


def _vera(
    entries: Sequence[Entry], found: Mapping[Site, Chain], spots: Mapping[str, list[PeftWeight]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by key, including the projections as PEFT does by default, and the config."""
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        b, B, d, _ = list(found[entry.site].factors)
        assert isinstance(b, Diag)
        assert isinstance(B, Projection)
        assert isinstance(d, Diag)
        (spot,) = spots[entry.site.weight]
        tensors |= {f"{spot.prefix}.vera_lambda_b": b.value, f"{spot.prefix}.vera_lambda_d": d.value}
        tensors |= {f"{BANK}.vera_A": B.bank.A, f"{BANK}.vera_B": B.bank.B}
    method = entries[0].method
    assert isinstance(method, VeRA)
    return tensors, {
        "peft_type": "VERA",
        "r": method.r,
        "d_initial": method.d_initial,
        "projection_prng_key": method.key,
        "save_projection": True,
        "vera_dropout": 0.0,
        "fan_in_fan_out": any(entry.site.transposed for entry in entries),
    }
