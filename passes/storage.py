"""Save and load adapters: from a model to a folder and back."""

from __future__ import annotations

import warnings
from math import prod
from pathlib import Path

import torch
from torch import nn

from graphpeft.adapters import places
from graphpeft.errors import AdapterError, FileError
from graphpeft.passes.activate import remove
from graphpeft.passes.initialize import initialize
from graphpeft.passes.insert import check_name, insert
from graphpeft.plan import Entry
from graphpeft.program import Site, stored
from graphpeft.state import chains, find_state, get_state, names, saved, set_active
from graphpeft.steps import step
from graphpeft.store.native import AdapterFile, fingerprint, read_adapter, write_adapter


def save(model: nn.Module, folder: str | Path, name: str | None = None) -> Path:
    """Write one adapter (the only one, or the one called `name`) to a folder; returns the folder.

    Only what was trained is stored, in the adapter's own dtype. Warns about base parameters that train too, for they
    belong to no adapter. Raises `AdapterError` if the model has several adapters and none is named.
    """
    state = get_state(model)
    if name is None and len(state.adapters) > 1:
        raise AdapterError(
            f"{type(model).__name__} has several adapters: {', '.join(state.adapters)}. Say which one to save, as in "
            f"gp.save(model, folder, name={next(iter(state.adapters))!r})."
        )
    (chosen,) = names(model, name)
    loose = [n for n, p in model.named_parameters() if p.requires_grad and n in state.required]
    if loose:
        warnings.warn(
            f"{', '.join(loose[:3])} {'and others train' if len(loose) > 3 else 'train'} too but belong to no adapter, so they "
            f"are not saved with it. Save them yourself: torch.save or safetensors on model.state_dict().",
            stacklevel=2,
        )
    adapter = state.adapters[chosen]
    tensors = {key: p for site, chain in chains(model, chosen).items() for key, p in saved(site, chain)}
    content = AdapterFile(
        chosen, adapter.rules, adapter.seed, adapter.entries, tensors, _fingerprint(model, adapter.entries)
    )
    write_adapter(Path(folder), content)
    return Path(folder)


def load(model: nn.Module, folder: str | Path, name: str | None = None, *, any_base: bool = False) -> nn.Module:
    """Add the adapter of a folder to a model and activate it; returns the model.

    `name` renames it. Raises `FileError`, and leaves the model as it was, if the folder is not an intact adapter, does
    not fit the model, or was trained on other base weights; with `any_base` the last is a warning.
    """
    content = read_adapter(Path(folder))
    chosen = name or content.name
    check_name(model, chosen)
    _check_sites(model, content, Path(folder))
    _check_base(model, content, Path(folder), any_base)
    before = state.active if (state := find_state(model)) else ()
    insert(model, chosen, content.rules, content.seed, content.entries)
    try:
        initialize(model, chosen)
        _fill(model, chosen, content, Path(folder))
        with step("activate", model):
            set_active(model, (chosen,))
    except BaseException:
        remove(model, chosen)
        if before:
            set_active(model, before)
        raise
    return model


def _check_base(model: nn.Module, content: AdapterFile, folder: Path, any_base: bool) -> None:
    """Base weights are those that the adapter was trained on, but for a cast to bfloat16."""
    if content.fingerprint == _fingerprint(model, content.entries):
        return
    found = f"{folder} was trained on other base weights than {type(model).__name__} has now."
    if not any_base:
        raise FileError(
            f"{found} Usually another checkpoint was loaded, or it was trained further. Load the base that the adapter was "
            f"made for; if the difference is meant, pass any_base=True and check the outputs."
        )
    warnings.warn(f"{found} The adapter is loaded as any_base=True asks; check its outputs.", stacklevel=3)


def _fingerprint(model: nn.Module, entries: tuple[Entry, ...]) -> str:
    state = find_state(model)
    originals = state.originals if state else {}
    paths = dict.fromkeys(e.site.weight for e in entries)
    return fingerprint({p: originals.get(p, stored(model, p)) for p in paths})


def _check_sites(model: nn.Module, content: AdapterFile, folder: Path) -> None:
    """Every weight that the file names is there with the shape it had, before anything is allocated."""
    shapes = {n: tuple(p.shape) for m_path, m in model.named_modules() for n, p in _own(m_path, m)}
    for site in (place for entry in content.entries for place in places(entry.site)):
        shape, wanted = shapes.get(site.weight), _shape(site)
        if shape is None or not _fits(shape, wanted):
            there = f"it is {shape} here" if shape is not None else "it is not there"
            raise FileError(
                f"{folder} does not fit {type(model).__name__}: it adapts {site.weight} of shape {wanted}, and {there}. "
                f"Usually the adapter was trained on another model. Load it on the base it was made for."
            )
        if site.owner and not _has(model, site.owner):
            raise FileError(f"{folder} does not fit {type(model).__name__}: there is no module {site.owner}.")
    for site in (entry.site for entry in content.entries):
        loose = [p.weight for p in site.tied if stored(model, p.weight) is not stored(model, site.weight)]
        if loose:
            raise FileError(
                f"{folder} does not fit {type(model).__name__}: one adapter serves {site.weight} and {', '.join(loose)}, "
                f"which were one tied tensor and are two here. Tie them as the base model did (tie_word_embeddings)."
            )


def _shape(site: Site) -> tuple[int, ...]:
    """The shape of a site's weight as a matrix, or as a stack of matrices."""
    matrix = (site.inputs, site.full) if site.transposed else (site.full, site.inputs)
    return (site.stack, *matrix) if site.stack else matrix


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a weight is that matrix with inputs or outputs spread over several axes, as a convolution's are."""
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


def _fill(model: nn.Module, name: str, content: AdapterFile, folder: Path) -> None:
    wanted = {key: p for site, chain in chains(model, name).items() for key, p in saved(site, chain)}
    missing, extra = sorted(wanted.keys() - content.tensors.keys()), sorted(content.tensors.keys() - wanted.keys())
    if missing or extra:
        raise FileError(
            f"{folder}: tensors and sites disagree; missing {missing[:3] or 'none'}, unexpected {extra[:3] or 'none'}. "
            f"The file was written by another version or changed by hand."
        )
    for key, parameter in wanted.items():
        tensor = content.tensors[key]
        if tensor.shape != parameter.shape:
            raise FileError(
                f"{folder}: {key} has shape {tuple(tensor.shape)}, the method makes {tuple(parameter.shape)}."
            )
        with torch.no_grad():
            parameter.copy_(tensor)
