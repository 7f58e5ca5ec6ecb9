"""An empty branch for a planned site, and what keeps a site from having one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from graphpeft.chain import Chain, Factor, Transform
from graphpeft.compat.accelerate import device_of
from graphpeft.compat.quantized import library
from graphpeft.errors import AdapterError
from graphpeft.ir.site import Site
from graphpeft.ir.weights import get_parameter
from graphpeft.planning.plan import Entry
from graphpeft.rewrite.adapters import places
from graphpeft.rewrite.kinds import kind_of


def check_places(model: nn.Module, entry: Entry) -> None:
    """The places of a site hold one tensor, in one orientation; a stack takes the weight form."""
    site = entry.site
    if site.stack and site.form != "weight":
        raise AdapterError(
            f"{site.weight} is a stack of {site.stack} matrices, which a side path cannot serve. Sites come from "
            f"gp.sites(model); there this one has the form 'weight'."
        )
    for place in site.tied:
        if get_parameter(model, place.weight) is not get_parameter(model, site.weight):
            raise AdapterError(
                f"{place.weight} and {site.weight} are planned as one tied weight, and are two tensors now. Usually the "
                f"model was untied in between, as by assigning to one of them. Plan again: gp.apply(model, rules)."
            )
        if place.transposed != site.transposed:
            raise AdapterError(
                f"{place.weight} and {site.weight} are one tensor, read as (out, in) by one module and as (in, out) by "
                f"the other, so no single update serves both. Untie them, or choose other sites."
            )


def at_holder(model: nn.Module, site: Site) -> Site:
    """The site with the module that holds the weight as its owner, where Python code reads the weight of a module below it: what
    the code reads is shown there."""
    holder = site.weight.rpartition(".")[0]
    tied = tuple(at_holder(model, place) for place in site.tied)
    if holder == site.owner or kind_of(model.get_submodule(site.owner)) == "graph":
        return replace(site, tied=tied) if tied != site.tied else site
    return replace(site, owner=holder, reader=site.owner, tied=tied)


def make_branch(model: nn.Module, entry: Entry, shared: dict[str, Any]) -> Chain:
    """An empty branch on the weight's device, in float32 where the base is in half precision or packed integers."""
    weight = get_parameter(model, entry.site.weight)
    check_places(model, entry)
    wide = weight.dtype in (torch.float32, torch.float64)
    with torch.device(device_of(model.get_submodule(entry.site.weight.rpartition(".")[0]), weight)):
        chain = entry.build().to(weight.dtype if wide else torch.float32)
    known = library(weight)
    if known and (entry.site.form == "weight" or not chain.has_side_path):
        raise AdapterError(
            f"{entry.site.weight} ({entry.site.role}) is quantized by {known}, and `{entry.rule}` needs weight + ΔW in floats on "
            f"every call there. Choose a method that runs beside the weight, such as lora, or load the base in floats."
        )
    for place in places(entry.site):
        if chain.before is not None and (place.form == "weight" or place.rows or place.role == "embed" or place.stack):
            raise AdapterError(
                f"{place.weight} ({place.role}) cannot have its input rounded: its module reads the input inside a fused "
                f"operator or shares it with other rows, or it picks rows by index. Use a rule of its own without that."
            )
        if place.form == "weight" and chain.probability:
            raise AdapterError(
                f"{place.weight} takes the weight form, because its module reads the weight inside a fused operator, "
                f"and dropout on the input cannot be expressed there. Use dropout=0 for `{entry.rule}`."
            )
        if place.role == "embed" and chain.probability:
            raise AdapterError(
                f"{place.weight} is an embedding table, whose input are indices: dropout has no features to act on. "
                f"Use dropout=0 for `{entry.rule}`."
            )
    for i, factor in enumerate(chain.factors):
        assert isinstance(factor, Factor)
        chain.factors[i] = factor.joined(shared)
    for module in chain.modules():
        if isinstance(module, Transform):
            module.join(shared)
    return chain
