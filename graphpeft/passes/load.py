"""Load an adapter from a folder, in graphpeft's or PEFT's format, onto a model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from graphpeft.ambient import plain
from graphpeft.capturing.capture import Inputs
from graphpeft.errors import AdapterError, FileError
from graphpeft.passes.activate import activate
from graphpeft.passes.initialize import initialize
from graphpeft.passes.insert import insert
from graphpeft.passes.remove import undone_on_error
from graphpeft.rewrite.entry import on_model
from graphpeft.rewrite.state import (
    chains,
    saved,
)
from graphpeft.store.hub import local
from graphpeft.store.native import AdapterFile
from graphpeft.store.read import read
from graphpeft.tracing import as_pass


@as_pass("load", "load an adapter from a folder")
@plain()
@on_model(adds=True)
def load(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    *,
    any_base: bool = False,
    strict: bool = True,
    hub: bool = False,
    revision: str | None = None,
    inputs: Inputs = None,
) -> nn.Module:
    """Add a saved adapter to a model and activate it; returns the model.

    Args:
        folder: a folder that `save` or PEFT wrote (LoRA, rsLoRA, DoRA and VeRA in safetensors), or `hub:owner/name`, a
            repository on the Hugging Face Hub.
        name: a new name for the adapter. PEFT's files hold no name; their adapter is called `default`.
        any_base: warn, instead of raising, if the adapter was trained on other base weights. PEFT's format does not record
            them, except those it saved too (`modules_to_save`), which are compared and never loaded.
        strict: raise, instead of warning, if tensors of a PEFT file are missing, unexpected, or of another shape.
        hub: `folder` is the `owner/name` of a repository on the Hub. Without this or `hub:`, the Hub is never contacted.
        revision: revision of the repository.
        inputs: an example call of a model that has no config to make one from. PEFT's files name modules, whose use is looked up
            in a capture; a module whose use was not seen runs its own code, and reads its weight adapted.

    Warns about tensors with NaN or infinite values, which are loaded as they are.

    Raises `FileError`, and leaves the model as it was, if the folder is not an intact adapter, does not fit the model, or
    was trained on other base weights.
    """
    place = local(folder, revision, hub)
    content = read(model, place, name, None, any_base=any_base, strict=strict, inputs=inputs)
    chosen = name or content.name
    with undone_on_error(model, chosen):
        insert_content(model, chosen, content, inputs)
        try:
            activate(model, chosen)
        except AdapterError as error:  # the file's sites do not match the model's code
            raise FileError(f"{place} does not fit {type(model).__name__}: {error}") from error
    return model


def insert_content(model: nn.Module, name: str, content: AdapterFile, inputs: Inputs = None) -> None:
    """Attach an adapter without activating it; on an error the model is as it was."""
    with undone_on_error(model, name):
        insert(model, name, content.rules, content.seed, content.entries, inputs)
        initialize(model, name)
        _fill(model, name, content)


@torch.no_grad()
def _fill(model: nn.Module, name: str, content: AdapterFile) -> None:
    for site, chain in chains(model, name).items():
        for key, parameter in saved(site, chain):
            parameter.copy_(content.tensors[key])
