"""Map PEFT's names of modules and parameters to the sites that dataflow found, or, where it found none, by path."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from torch import fx, nn

from graphpeft.ir.layers import layer_of
from graphpeft.ir.site import Site
from graphpeft.rewrite.adapters import places
from graphpeft.store.peft.config import targeted
from graphpeft.store.peft.layout import PREFIX, NoEquivalent, PeftWeight, conv1d, modules, nesting, place
from graphpeft.store.peft.patterns import Patterns

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def locate(
    model: nn.Module, config: Mapping[str, Any], prefixes: Iterable[str], found: Sequence[Site], patterns: Patterns
) -> Iterator[tuple[Site, PeftWeight]]:
    """Every place that a key prefix or the config names, with graphpeft's site of the whole weight.

    `found` are the sites that dataflow found. Prefixes that match no weight of the model are skipped. Raises
    `NoEquivalent` for a weight that PEFT adapts differently.
    """
    nested = nesting(model, config.get("target_parameters") or ())
    weights = {PREFIX + prefix: weight for weight, prefix in nested.items()}
    names = targeted(config, (name for name, _ in modules(model)), patterns)
    weights |= {PREFIX + name: f"{name}.weight" for name in names}
    holders, paths = _by_holder(model, found), dict(modules(model))
    for prefix in dict.fromkeys([*prefixes, *weights]):
        weight = weights.get(prefix, prefix.removeprefix(PREFIX) + ".weight")
        site = _site(model, weight, holders, paths)
        if site is not None:
            try:
                spot = place(model, site, nested)
                # A linear map listed in target_parameters goes by its weight's name, in patterns too.
                yield site, replace(spot, target=weight) if PREFIX + nested.get(weight, "") == prefix else spot
            except NoEquivalent as error:
                raise NoEquivalent(f"{weight} ({site.role}): {error}") from error


def _by_holder(model: nn.Module, found: Iterable[Site]) -> dict[tuple[int, str], Site]:
    """Sites of whole weights, keyed by the module that holds the weight: a module can have several names."""
    made: dict[tuple[int, str], Site] = {}
    for site in (each for one in found for each in places(one)):
        path, _, leaf = site.weight.rpartition(".")
        key = id(model.get_submodule(path)), leaf
        part = key in made or site.rows is not None
        whole = replace(site, role="other", rows=None, shape=(site.full, site.inputs)) if part else site
        made[key] = replace(whole, tied=())
    return made


def _site(
    model: nn.Module, weight: str, holders: Mapping[tuple[int, str], Site], paths: Mapping[str, nn.Module]
) -> Site | None:
    """A weight's site from dataflow. A linear map, table or convolution that dataflow did not reach gets one by path."""
    path, _, leaf = weight.rpartition(".")
    module: Any = paths.get(path)
    if module is None or leaf not in module._parameters:
        return None
    if (id(module), leaf) in holders:
        return holders[id(module), leaf]
    transposed, conv = conv1d(module), isinstance(module, CONVOLUTIONS)
    known = transposed or conv or isinstance(module, (nn.Linear, nn.Embedding))
    if not known or isinstance(model, fx.GraphModule):
        return None
    rows, *columns = module.weight.shape
    shape = (columns[0], rows) if transposed else (rows, prod(columns))
    role = "conv" if conv else "embed" if isinstance(module, nn.Embedding) else "other"
    layer = layer_of(weight)
    made = Site(role, weight, None, False, layer, shape, owner=path, full=shape[0], transposed=transposed, calls=0)
    return replace(made, form="weight") if conv else made
