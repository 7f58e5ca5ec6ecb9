"""Read an adapter's folder, and check it against the model."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from graphpeft.capturing.capture import Inputs
from graphpeft.capturing.survey import find_base_sites
from graphpeft.compat.quantized import levels
from graphpeft.errors import CaptureError, FileError
from graphpeft.ir.site import Site
from graphpeft.ir.weights import get_parameter
from graphpeft.planning.plan import Entry
from graphpeft.rewrite.naming import check_name, usable
from graphpeft.rewrite.state import (
    base_weight,
)
from graphpeft.store.fingerprint import VERSION, fingerprint, version
from graphpeft.store.finite import odd_tensors, warn_of
from graphpeft.store.fitting import check_sites, check_tensors
from graphpeft.store.native import DESCRIPTION, AdapterFile, read_adapter
from graphpeft.store.peft.config import CONFIG
from graphpeft.store.peft.read import read_peft


def read(
    model: nn.Module,
    folder: Path,
    name: str | None,
    sites: tuple[Site, ...] | None,
    *,
    any_base: bool,
    strict: bool,
    inputs: Inputs = None,
) -> AdapterFile:
    """A folder's content, checked against the model. PEFT's names are matched with `sites`, by default all sites found."""
    if (folder / CONFIG).is_file() and not (folder / DESCRIPTION).is_file():
        check_name(model, name or "default")
        found = found_sites(model, inputs) if sites is None else sites
        content = read_peft(model, folder, found, any_base=any_base, strict=strict)
    else:
        content = read_adapter(folder)
    if name is None and not usable(content.name):
        raise FileError(
            f"{folder} calls its adapter {content.name!r}, which is not a valid name. Give it another one, with name=."
        )
    check_name(model, name or content.name)
    check_sites(model, content, folder)
    check_tensors(content, folder)
    _check_base(model, content, folder, any_base)
    warn_of(odd_tensors(content.tensors, content.entries), folder, "They are loaded as they are.", stacklevel=6)
    return content


def found_sites(model: nn.Module, inputs: Inputs = None) -> tuple[Site, ...]:
    """The sites that dataflow finds. None if the model cannot be captured; weights are then located by their paths."""
    try:
        return find_base_sites(model, inputs).sites
    except CaptureError:
        if inputs is not None:
            raise
        return ()


def _check_base(model: nn.Module, content: AdapterFile, folder: Path, any_base: bool) -> None:
    """Check the base weights against those the adapter was trained on, up to a bfloat16 cast. PEFT's files record none."""
    wanted = content.fingerprint
    if not wanted or wanted == base_fingerprint(model, content.entries, version(wanted)):
        return
    found = f"{folder} was trained on other base weights than {type(model).__name__} has now."
    if not any_base:
        raise FileError(
            f"{found} Usually another checkpoint was loaded, or it was trained further, or one of the two is quantized or was "
            f"cast to float16. Load the base that the adapter was made for; if the difference is intended, pass any_base=True "
            f"and check the outputs."
        )
    warnings.warn(f"{found} The adapter is loaded as any_base=True asks; check its outputs.", stacklevel=5)


def base_fingerprint(model: nn.Module, entries: tuple[Entry, ...], version: int = VERSION) -> str:
    def weight_of(name: str) -> torch.Tensor:
        found = levels(get_parameter(model, name), model.get_submodule(name.rpartition(".")[0]))
        return base_weight(model, name) if found is None else found

    return fingerprint((e.site.weight for e in entries), weight_of, version)
