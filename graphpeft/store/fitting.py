"""Whether an adapter's file fits a model: its sites, shapes and tensors, before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from graphpeft.chain import Chain, Factor
from graphpeft.compat.quantized import shape as float_shape
from graphpeft.errors import AdapterError, FileError
from graphpeft.ir.site import Site
from graphpeft.ir.weights import get_parameter
from graphpeft.rewrite.adapters import places
from graphpeft.rewrite.state import (
    saved,
)
from graphpeft.store.native import AdapterFile


def check_sites(model: nn.Module, content: AdapterFile, folder: Path) -> None:
    """Check that the model has every weight that the file names, in the same shape, before anything is allocated."""
    shapes = {n: float_shape(p, m) for m_path, m in model.named_modules() for n, p in _own(m_path, m)}
    for site in (place for entry in content.entries for place in places(entry.site)):
        shape, wanted = shapes.get(site.weight), _shape(site)
        if shape is None or not _fits(shape, wanted):
            there = f"this model has {shape}" if shape is not None else "this model has no such weight"
            raise FileError(
                f"{folder} does not fit {type(model).__name__}: it adapts {site.weight} of shape {wanted}, and {there}. "
                f"Usually the adapter was trained on another model. Load it on the base it was made for."
            )
        if site.owner and not _has(model, site.owner):
            raise FileError(f"{folder} does not fit {type(model).__name__}: there is no module {site.owner}.")
        held_by = site.weight.rpartition(".")[0]
        if site.form == "weight" and site.owner != held_by and not isinstance(model, fx.GraphModule):
            raise FileError(
                f"{folder}: it adapts {site.weight} as weight + ΔW in {site.owner or 'the model'}, which does not hold this "
                f"weight itself. The file was edited by hand, or damaged."
            )
    for site in (entry.site for entry in content.entries):
        loose = [p.weight for p in site.tied if get_parameter(model, p.weight) is not get_parameter(model, site.weight)]
        if loose:
            raise FileError(
                f"{folder} does not fit {type(model).__name__}: one adapter serves {site.weight} and {', '.join(loose)}, "
                f"which were one tied tensor and are separate here. Tie them as the base model did (tie_word_embeddings)."
            )


def _shape(site: Site) -> tuple[int, ...]:
    """The shape of a site's weight as a matrix, or as a stack of matrices."""
    matrix = (site.inputs, site.full) if site.transposed else (site.full, site.inputs)
    return (site.stack, *matrix) if site.stack else matrix


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a weight is this matrix with inputs or outputs spread over several axes, as in a convolution."""
    *stack, rows, columns = wanted
    rest = shape[len(stack) :]
    cuts = range(1, len(rest))
    return shape[: len(stack)] == tuple(stack) and any(
        (prod(rest[:i]), prod(rest[i:])) == (rows, columns) for i in cuts
    )


def _own(path: str, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(prefix=path, recurse=False, remove_duplicate=False))


def _has(model: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in model.named_modules(remove_duplicate=False))


def check_tensors(content: AdapterFile, folder: Path) -> None:
    """Check that the file has exactly the tensors of its sites' methods. They are built on the meta device, without data."""
    wanted: dict[str, tuple[int, ...]] = {}
    try:
        with torch.device("meta"):
            made = [(entry.site, entry.build()) for entry in content.entries]
            _share([chain for _, chain in made])  # a shared tensor is as wide as its widest site needs
            for site, chain in made:
                wanted |= {key: tuple(tensor.shape) for key, tensor in saved(site, chain)}
    except (AdapterError, RuntimeError, ValueError, OverflowError, TypeError) as error:
        raise FileError(
            f"{folder}: its methods do not fit its sites: {error}. The file was edited by hand, or damaged."
        ) from error
    missing, extra = sorted(wanted.keys() - content.tensors.keys()), sorted(content.tensors.keys() - wanted.keys())
    if missing or extra:
        raise FileError(
            f"{folder}: tensors and sites disagree; missing {missing[:3] or 'none'}, unexpected {extra[:3] or 'none'}. "
            f"The file was written by another version or changed by hand."
        )
    for key, shape in wanted.items():
        if tuple(content.tensors[key].shape) != shape:
            found = tuple(content.tensors[key].shape)
            raise FileError(f"{folder}: {key} has shape {found}, but the method makes {shape}.")


def _share(chains: Iterable[Chain]) -> None:
    pool: dict[str, Any] = {}
    for chain in chains:
        for place, factor in enumerate(chain.factors):
            assert isinstance(factor, Factor)
            chain.factors[place] = factor.joined(pool)
