"""Save an adapter of a model to a folder, in graphpeft's or PEFT's format."""

from __future__ import annotations

import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from graphpeft.ambient import plain
from graphpeft.compat.sharded import gathered, written
from graphpeft.errors import AdapterError, FileError
from graphpeft.rewrite.entry import on_model
from graphpeft.rewrite.state import (
    branches,
    chains,
    get_state,
    names,
    saved,
)
from graphpeft.store.hub import upload
from graphpeft.store.native import DESCRIPTION, AdapterFile, write_adapter
from graphpeft.store.peft.config import CONFIG
from graphpeft.store.peft.write import write_peft
from graphpeft.store.read import base_fingerprint
from graphpeft.tracing import as_pass

Format = Literal["graphpeft", "peft"]


@as_pass("save", "write an adapter to a folder")
@plain()
@on_model(intact=False)
def save(model: nn.Module, folder: str | Path, name: str | None = None, format: Format = "graphpeft") -> Path:
    """Write one adapter (the only one, or the one called `name`) to a folder; returns the folder.

    Only trained tensors are stored, in the adapter's own dtype. Warns about base parameters that train too, because they
    belong to no adapter, and about tensors with NaN or infinite values, which are saved as they are.

    With `format="peft"`, `peft.PeftModel.from_pretrained(base, folder)` loads the folder and gives the same outputs. LoRA
    (with rsLoRA), DoRA and VeRA are written as such. Every other method is written as the plain LoRA that equals it, as
    `gp.lower` computes it, and loads as LoRA. PEFT adapts a fused weight as a whole: its sites are written as one LoRA
    whose rank is their sum, zero in all other rows.

    On a model sharded by FSDP2 every process must call it: the tensors are gathered, and rank 0 writes them.

    Raises `AdapterError`, and writes nothing, if the model has several adapters and none is named, or if PEFT's format
    cannot hold a site's update; `FileError` if the folder holds an adapter in the other format.
    """
    if format not in get_args(Format):
        raise AdapterError(f"There is no format {format!r}. Formats: {', '.join(get_args(Format))}.")
    state = get_state(model)
    if name is None and len(state.adapters) > 1:
        raise AdapterError(
            f"{type(model).__name__} has several adapters: {', '.join(state.adapters)}. Say which one to save, as in "
            f"gp.save(model, folder, name={next(iter(state.adapters))!r})."
        )
    (chosen,) = names(model, name)
    loose = [n for n, p in model.named_parameters() if p.requires_grad and n in state.base_requires_grad]
    if loose:
        warnings.warn(
            f"{', '.join(loose[:3])} {'and others train' if len(loose) > 3 else 'train'} too but belong to no adapter, so they "
            f"are not saved with it. Save them yourself, from model.state_dict() with torch.save or safetensors.",
            stacklevel=5,
        )
    with gathered(model, branches(model, chosen)):
        written(model, Path(folder), partial(_write, model, chosen, format))
    return Path(folder)


def _write(model: nn.Module, name: str, format: Format, folder: Path) -> None:
    other = folder / (DESCRIPTION if format == "peft" else CONFIG)
    if other.exists():
        raise FileError(
            f"{other} belongs to an adapter in another format, which would stay beside this one. Name another folder."
        )
    if format == "peft":
        write_peft(model, name, folder)
        return
    adapter = get_state(model).adapters[name]
    tensors = {key: p for site, chain in chains(model, name).items() for key, p in saved(site, chain)}
    absent = next((key for key, tensor in tensors.items() if tensor.is_meta), None)
    if absent is not None:
        raise AdapterError(
            f"{absent} has no values to save: it is on the meta device. Usually accelerate offloaded the adapter with its "
            f"model. Call dispatch_model before gp.apply; the adapter then stays on the device where it trains."
        )
    base = base_fingerprint(model, adapter.entries)
    found = chains(model, name)
    entries = tuple(entry.as_it_is(found[entry.site]) for entry in adapter.entries)
    write_adapter(folder, AdapterFile(name, adapter.rules, adapter.seed, entries, tensors, base))


@on_model(intact=False)
def push_to_hub(
    model: nn.Module, repo_id: str, name: str | None = None, format: Format = "graphpeft", **options: Any
) -> str:
    """Save an adapter as `save` does, and upload it to a repository on the Hugging Face Hub; returns the commit's URL.

    The repository is created if it does not exist. `options` are `private` and the options of
    `huggingface_hub.upload_folder`, such as `token` and `commit_message`. Raises the errors of `save` and huggingface_hub.
    """
    with tempfile.TemporaryDirectory() as folder:
        return upload(save(model, folder, name, format), repo_id, **options)
