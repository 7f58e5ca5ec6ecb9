"""Load: the adapter of a folder onto a model, in our own format or PEFT's."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from graphpeft.ambient import plain
from graphpeft.errors import AdapterError, FileError
from graphpeft.passes.activate import activate
from graphpeft.passes.initialize import initialize
from graphpeft.passes.insert import insert
from graphpeft.passes.remove import undone_on_error
from graphpeft.rewrite.state import (
    chains,
    saved,
)
from graphpeft.store.hub import local
from graphpeft.store.native import AdapterFile
from graphpeft.store.read import read
from graphpeft.tracing import as_pass


@as_pass("load", "the adapter of a folder")
@plain()
def load(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    *,
    any_base: bool = False,
    strict: bool = True,
    hub: bool = False,
    revision: str | None = None,
) -> nn.Module:
    """Add the adapter of a folder to a model and activate it; returns the model.

    Args:
        folder: one that `save` wrote, or PEFT (LoRA, rsLoRA, DoRA and VeRA in safetensors); or `hub:owner/name`, a repository
            of the Hugging Face Hub.
        name: renames it; an adapter of PEFT's has no name of its own, and is called `default`.
        any_base: other base weights than the adapter was trained on are a warning rather than an error. PEFT's format says
            nothing of them, but for those that it saved too (`modules_to_save`), which are never loaded.
        strict: tensors of PEFT's that are missing, unexpected, or of another shape are an error rather than a warning.
        hub: whether `folder` is `owner/name` of a repository on the Hub. Nothing else asks the Hub.
        revision: of the repository.

    Raises `FileError`, and leaves the model as it was, if the folder is not an intact adapter, does not fit the model, or
    was trained on other base weights.
    """
    place = local(folder, revision, hub)
    content = read(model, place, name, None, any_base=any_base, strict=strict)
    chosen = name or content.name
    with undone_on_error(model, chosen):
        insert_content(model, chosen, content)
        try:
            activate(model, chosen)
        except AdapterError as error:  # what the file says of the model's code is not so
            raise FileError(f"{place} does not fit {type(model).__name__}: {error}") from error
    return model


def insert_content(model: nn.Module, name: str, content: AdapterFile) -> None:
    """Put an adapter onto the model without activating it; if that fails the model is as it was."""
    with undone_on_error(model, name):
        insert(model, name, content.rules, content.seed, content.entries)
        initialize(model, name)
        _fill(model, name, content)


@torch.no_grad()
def _fill(model: nn.Module, name: str, content: AdapterFile) -> None:
    for site, chain in chains(model, name).items():
        for key, parameter in saved(site, chain):
            parameter.copy_(content.tensors[key])
