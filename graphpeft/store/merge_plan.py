"""Plan a merge on disk: check adapters against a checkpoint, almost without reading its weights, and assign each update
to the stored tensors that it changes.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphpeft.capturing.skeleton import skeleton
from graphpeft.compat.transformers_keys import origins
from graphpeft.errors import FileError
from graphpeft.files.foreign import read_bytes
from graphpeft.ir.site import Site
from graphpeft.ir.weights import get_parameter
from graphpeft.rewrite.branch import make_branch
from graphpeft.rewrite.tied import refuse_tied
from graphpeft.store.checkpoint import FLOATS, Checkpoint
from graphpeft.store.fingerprint import fingerprint, version
from graphpeft.store.fitting import check_sites, check_tensors
from graphpeft.store.folding import Update
from graphpeft.store.native import DESCRIPTION, AdapterFile, read_adapter
from graphpeft.store.peft import config as peft_config
from graphpeft.store.peft import read as peft_read
from graphpeft.store.peft.files import PAIR
from graphpeft.store.read import found_sites

Updates = dict[str, list[Update]]
"""The updates of each stored tensor, by name, in the order in which they are added."""
Held = dict[nn.Parameter, list[tuple[str, bool]]]
"""What `origins` returns."""


def plan_updates(checkpoint: Checkpoint, folders: Sequence[Path], any_base: bool) -> Updates:
    """The updates of all adapters. The model and the chains are on the meta device: they have shapes and no values.

    Raises `FileError` for an adapter that does not fit the checkpoint, and `AdapterError` for one that cannot be folded.
    """
    model = skeleton(str(checkpoint.folder))
    held = origins(model, checkpoint.where)
    planned: Updates = {}
    for folder in folders:
        content = _read(model, folder, any_base, _values(model, checkpoint, held))
        check_sites(model, content, folder)
        check_tensors(content, folder)
        keys = {entry.site: _keys(model, entry.site, checkpoint, held) for entry in content.entries}
        _check_base(checkpoint, {site.weight: names[0] for site, names in keys.items()}, content, folder, any_base)
        shared: dict[str, Any] = {}
        made = {entry.site: make_branch(model, entry, shared) for entry in content.entries}
        for site, chain in made.items():
            refuse_tied(model, site)
            chain.require_linear(f"{folder} cannot be folded into {site.weight} ({site.role})")
            for key in keys[site]:
                one = Update(str(folder), site, chain, content.tensors, content.seed)
                planned.setdefault(key, []).append(one)
    return planned


def digest(folder: Path) -> str:
    """A hash of an adapter folder's content."""
    if not _is_peft(folder):
        return hashlib.sha256(read_bytes(folder / DESCRIPTION)).hexdigest()  # it includes the tensors' digest
    parts = folder / peft_config.CONFIG, PAIR.find(folder)
    return hashlib.sha256(b"".join(map(read_bytes, parts))).hexdigest()


def _is_peft(folder: Path) -> bool:
    return (folder / peft_config.CONFIG).is_file() and not (folder / DESCRIPTION).is_file()


def _read(model: nn.Module, folder: Path, any_base: bool, base: peft_read.Base) -> AdapterFile:
    if _is_peft(folder):
        return peft_read.read_peft(model, folder, found_sites(model), any_base=any_base, strict=True, base=base)
    return read_adapter(folder)


def _values(model: nn.Module, checkpoint: Checkpoint, held: Held) -> peft_read.Base:
    """A function from a model tensor's name to its stored values; NaN if transformers builds the tensor from others."""
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def value(name: str) -> torch.Tensor:
        found = held.get(parameters[name], []) if name in parameters else [(name, False)]
        for key, converted in found:
            if not converted and key in checkpoint.where and checkpoint.where[key].tensors[key].dtype in FLOATS:
                return checkpoint.where[key].tensor(key)
        return torch.tensor(torch.nan)

    return value


def _keys(model: nn.Module, site: Site, checkpoint: Checkpoint, held: Held) -> list[str]:
    """The checkpoint's tensors for a site's weight: one, or several if a tied weight is stored more than once.

    Also casts the model's weight to the stored dtype, which determines the chain's dtype.
    """
    parameter = get_parameter(model, site.weight)
    found = held.get(parameter, [])
    made = [key for key, converted in found if converted]
    if made or not found:
        what = f"makes it from {', '.join(made[:3])}" if made else "finds no tensor for it, or makes it from others,"
        raise FileError(
            f"{checkpoint.folder} does not store {site.weight} as it is: transformers {what} during loading. Merge in memory: "
            f"from_pretrained, gp.load, gp.merge, save_pretrained."
        )
    for key, _ in found:
        place, shape = checkpoint.where[key].tensors[key], tuple(parameter.shape)
        if place.dtype not in FLOATS:
            raise FileError(
                f"{checkpoint.folder} stores {key} as {place.dtype}, to which no update can be added. Merge into the "
                f"checkpoint that was quantized, and quantize the result."
            )
        if place.shape != shape:
            raise FileError(
                f"{checkpoint.folder} stores {key} with shape {place.shape}, but its config.json says {shape}. Usually one of "
                f"the two files belongs to another model; copy the whole folder again."
            )
        parameter.data = parameter.data.to(FLOATS[place.dtype])
    return [key for key, _ in found]


def _check_base(
    checkpoint: Checkpoint, keys: dict[str, str], content: AdapterFile, folder: Path, any_base: bool
) -> None:
    """Check the base weights as `gp.load` does. PEFT's files do not record theirs."""
    if not content.fingerprint:
        return
    way = version(content.fingerprint)
    if content.fingerprint == fingerprint(
        keys, lambda name: checkpoint.where[keys[name]].glimpse(keys[name], way), way
    ):
        return
    problem = f"{folder} was trained on other base weights than {checkpoint.folder} holds."
    if not any_base:
        raise FileError(
            f"{problem} Usually that is another checkpoint, or one that was trained further. Name the base that the adapter "
            f"was made for; if the difference is intended, pass any_base=True (--any-base) and check the outputs."
        )
    warnings.warn(f"{problem} It is merged as any_base=True asks; check the outputs.", stacklevel=5)
