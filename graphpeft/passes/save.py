"""Save an adapter: from a model to a folder, in our own format or PEFT's."""

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


@as_pass("save", "an adapter into a folder")
@plain()
def save(model: nn.Module, folder: str | Path, name: str | None = None, format: Format = "graphpeft") -> Path:
    """Write one adapter (the only one, or the one called `name`) to a folder; returns the folder.

    Only what was trained is stored, in the adapter's own dtype. Warns about base parameters that train too, for they
    belong to no adapter.

    With `format="peft"` the folder is one that `peft.PeftModel.from_pretrained(base, folder)` loads to the same outputs. LoRA
    (with rsLoRA) and DoRA go as they are; of a fused projection the whole weight is adapted there, with zeros in the rows
    that no site has, and of its several sites one LoRA of the summed rank. VeRA goes as VeRA. Every other method goes as
    the plain LoRA that it equals, as `gp.lower` makes it, so that it does not load as that method again.

    Of a model sharded by FSDP2 every process has to call it: the tensors are gathered, and the first process writes them.

    Raises `AdapterError`, and writes nothing, if the model has several adapters and none is named, or for a site whose
    update PEFT cannot hold; `FileError` if the folder holds an adapter in the other format.
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
    loose = [n for n, p in model.named_parameters() if p.requires_grad and n in state.required]
    if loose:
        warnings.warn(
            f"{', '.join(loose[:3])} {'and others train' if len(loose) > 3 else 'train'} too but belong to no adapter, so they "
            f"are not saved with it. Save them yourself: torch.save or safetensors on model.state_dict().",
            stacklevel=2,
        )
    with gathered(model, branches(model, chosen)):
        written(model, Path(folder), partial(_write, model, chosen, format))
    return Path(folder)


def _write(model: nn.Module, name: str, format: Format, folder: Path) -> None:
    other = folder / (DESCRIPTION if format == "peft" else CONFIG)
    if other.exists():
        raise FileError(
            f"{other} is an adapter in another format, which would stay beside this one. Name another folder."
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
            f"model. Call dispatch_model before gp.apply, which then leaves the adapter where it trains."
        )
    base = base_fingerprint(model, adapter.entries)
    write_adapter(folder, AdapterFile(name, adapter.rules, adapter.seed, adapter.entries, tensors, base))


def push_to_hub(
    model: nn.Module, repo_id: str, name: str | None = None, format: Format = "graphpeft", **options: Any
) -> str:
    """Save an adapter as `save` does, and put it into a repository of the Hugging Face Hub; returns the commit's URL.

    The repository is made if it is not there. `options` are those of `huggingface_hub.upload_folder`, such as `token` and
    `commit_message`, and `private`. Raises as `save` and huggingface_hub do.
    """
    with tempfile.TemporaryDirectory() as folder:
        return upload(save(model, folder, name, format), repo_id, **options)
