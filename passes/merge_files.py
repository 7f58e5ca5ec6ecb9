"""Merge on disk: a checkpoint and adapters in, a checkpoint out, one weight in memory at a time."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

from graphpeft.errors import AdapterError, FileError
from graphpeft.passes.merge import _refuse_tied as refuse_tied
from graphpeft.passes.storage import load
from graphpeft.program import Site, stored
from graphpeft.skeleton import skeleton
from graphpeft.state import chains
from graphpeft.steps import counted, named, step
from graphpeft.store import unfinished
from graphpeft.store.checkpoint import FLOATS, INDEX, WHOLE, Checkpoint, Shard, open_checkpoint
from graphpeft.store.folding import Update, folded
from graphpeft.store.keys import origins
from graphpeft.store.native import DESCRIPTION, TENSORS, AdapterFile, fingerprint, read_adapter

CHUNK = 1 << 22
"""Bytes that are copied at a time."""
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".gguf"}
"""Endings of files that hold weights: beside merged ones they would be those of another model."""

Updates = dict[str, list[Update]]
"""By the name of a stored tensor, what is added to it."""


@dataclass(frozen=True)
class MergedFiles:
    """What `merge_files` did."""

    out: Path
    tensors: int
    """Stored tensors that have updates in them."""
    shards: int
    kept: int
    """Shards that an earlier run had finished."""
    left_out: tuple[str, ...]
    """Files of the base folder that hold weights in another form, and were not copied."""

    def __str__(self) -> str:
        kept = f", of which {self.kept} finished before" if self.kept else ""
        left = f"\nnot copied, for they hold weights of the base: {', '.join(self.left_out)}" if self.left_out else ""
        return f"{self.out}: {self.tensors} tensors merged in {self.shards} files{kept}{left}"


@named("merge-files")
def merge_files(
    base: str | Path, adapter: str | Path | Sequence[str | Path], out: str | Path, *, any_base: bool = False
) -> MergedFiles:
    """Fold adapters into a checkpoint on disk, without building the model.

    Args:
        base: a folder of a transformers model in safetensors, one file or shards.
        adapter: a folder that `gp.save` wrote, or several, folded in this order.
        out: a new folder. It appears when it is whole; until then the work stands in `out.part`, and the same call after a
            kill goes on from there. Shards, names, dtypes and metadata are the base's, and its tokenizer and configs are
            copied.
        any_base: only warn if an adapter was trained on other base weights.

    The bytes of every weight are those that `gp.merge` would make in a model of the checkpoint's dtype.

    Raises:
        FileError: a file is missing or damaged, an adapter does not fit, `out` exists, an earlier run had other sources, the
            disk is full (finished shards stay), or transformers makes an adapted weight from several stored ones.
        AdapterError: a merged weight is not finite, or an adapter cannot be folded.
    """
    base, out = Path(base).resolve(), Path(out).resolve()
    folders = [Path(each) for each in ([adapter] if isinstance(adapter, str | Path) else adapter)]
    if base in out.parents:
        raise FileError(f"{out} lies inside of {base}, whose files are copied. Name a folder elsewhere.")
    checkpoint = open_checkpoint(base)
    updates = _plan(checkpoint, folders, any_base)
    sources = {"base": checkpoint.digest(), "adapter": "+".join(map(_digest, folders))}
    others, left_out = _others(checkpoint)
    count, kept = len(updates), 0
    try:
        folder = unfinished.begin(out, sources)
        if folder is not None:
            kept = sum(_finished(folder, shard) for shard in checkpoint.shards)
            for shard in checkpoint.shards:
                if not _finished(folder, shard):
                    _write(shard, folder, updates)
            for path in others:
                with unfinished.writing(folder / path) as file, (base / path).open("rb") as source:
                    shutil.copyfileobj(source, file, CHUNK)
            unfinished.finish(out)
    except AdapterError:
        unfinished.discard(out)  # it would not come out otherwise another time
        raise
    except OSError as error:
        raise FileError(
            f"{out} could not be finished: {error}. What is done stays in {out.name}.part: make room, or mend what is named, "
            f"and give the same command again."
        ) from error
    return MergedFiles(out, count, len(checkpoint.shards), len(checkpoint.shards) if folder is None else kept, left_out)


# -- what is added to which tensor ---------------------------------------------------------------------------------


def _plan(checkpoint: Checkpoint, folders: Sequence[Path], any_base: bool) -> Updates:
    """Every adapter checked against the checkpoint, and its chains, still without memory, by the tensors they go into."""
    model = skeleton(str(checkpoint.folder))
    held = origins(model, checkpoint.where)
    planned: Updates = {}
    for number, folder in enumerate(folders):
        content = read_adapter(folder)
        for site in (entry.site for entry in content.entries):
            _take_dtype(model, site, checkpoint, held)
        with warnings.catch_warnings():  # there are no weights that could be the right ones
            warnings.simplefilter("ignore")
            load(model, folder, name=f"adapter_{number}", any_base=True)
        found = chains(model, f"adapter_{number}")
        keys = {site: _keys(model, site, checkpoint, held) for site in found}
        _check_base(checkpoint, {site.weight: names[0] for site, names in keys.items()}, content, folder, any_base)
        for site, chain in found.items():
            refuse_tied(model, site)
            chain.require_linear(f"{folder} cannot be folded into {site.weight} ({site.role})")
            for key in keys[site]:
                one = Update(str(folder), site, chain, content.tensors, content.seed)
                planned.setdefault(key, []).append(one)
    return planned


Held = dict[nn.Parameter, list[tuple[str, bool]]]


def _keys(model: nn.Module, site: Site, checkpoint: Checkpoint, held: Held) -> list[str]:
    """The tensors of the checkpoint that are the weight of a site: one, or more where a tied one is stored repeatedly."""
    found = held.get(stored(model, site.weight), [])
    made = [key for key, converted in found if converted]
    if made or not found:
        what = f"makes it from {', '.join(made[:3])}" if made else "finds no tensor of it, or makes it from others,"
        raise FileError(
            f"{checkpoint.folder} does not store {site.weight} as it is: transformers {what} while it loads. Merge in memory: "
            f"from_pretrained, gp.load, gp.merge, save_pretrained."
        )
    for key in (key for key, _ in found):
        place, shape = checkpoint.where[key].tensors[key], tuple(stored(model, site.weight).shape)
        if place.dtype not in FLOATS:
            raise FileError(
                f"{checkpoint.folder} stores {key} as {place.dtype}, to which no update can be added. Merge into the "
                f"checkpoint that was quantized, and quantize the result."
            )
        if place.shape != shape:
            raise FileError(
                f"{checkpoint.folder} stores {key} as {place.shape}, where its config.json says {shape}. Usually one of the "
                f"two files is of another model; copy the whole folder again."
            )
    return [key for key, _ in found]


def _take_dtype(model: nn.Module, site: Site, checkpoint: Checkpoint, held: Held) -> None:
    """Make the skeleton's weight of the dtype that is stored, which a chain computes by. What does not fit is told by `load`."""
    parameter = dict(model.named_parameters(remove_duplicate=False)).get(site.weight)
    for key, _ in held.get(parameter, []) if parameter is not None else []:
        dtype = FLOATS.get(checkpoint.where[key].tensors[key].dtype)
        if parameter is not None and dtype is not None:
            parameter.data = parameter.data.to(dtype)


def _check_base(
    checkpoint: Checkpoint, keys: dict[str, str], content: AdapterFile, folder: Path, any_base: bool
) -> None:
    found = fingerprint({weight: checkpoint.where[key].tensor(key) for weight, key in keys.items()})
    if found == content.fingerprint:
        return
    problem = f"{folder} was trained on other base weights than {checkpoint.folder} holds."
    if not any_base:
        raise FileError(
            f"{problem} Usually that is another checkpoint, or one that was trained further. Name the base that the adapter "
            f"was made for; if the difference is meant, pass any_base=True (--any-base) and check the outputs."
        )
    warnings.warn(f"{problem} It is merged as any_base=True asks; check the outputs.", stacklevel=5)


def _digest(adapter: Path) -> str:
    return hashlib.sha256(b"".join((adapter / name).read_bytes() for name in (DESCRIPTION, TENSORS))).hexdigest()


# -- files -----------------------------------------------------------------------------------------------------------


def _finished(folder: Path, shard: Shard) -> bool:
    path = folder / shard.path.name
    return path.is_file() and path.stat().st_size == shard.size


def _write(shard: Shard, folder: Path, updates: Updates) -> None:
    with (
        step(shard.path.name),
        unfinished.writing(folder / shard.path.name) as file,
        shard.path.open("rb", buffering=0) as source,
    ):
        file.write(shard.header)
        for name, place in counted(list(shard.tensors.items())):
            if name in updates:
                for block in folded(name, shard.tensor(name), updates.pop(name)):
                    file.write(block.view(torch.uint8).numpy().data)
            else:
                _copy(source, file, place.begin, place.end)


def _copy(source: BinaryIO, file: BinaryIO, begin: int, end: int) -> None:
    source.seek(begin)
    while begin < end:
        data = source.read(min(CHUNK, end - begin))
        if not data:
            raise OSError(f"{source.name} became shorter while it was read")
        file.write(data)
        begin += len(data)


def _others(checkpoint: Checkpoint) -> tuple[list[Path], tuple[str, ...]]:
    """Further files of the folder, to copy and to leave out; the index is among the former, for no name or size changes."""
    shards = {shard.path.name for shard in checkpoint.shards}
    files = [path.relative_to(checkpoint.folder) for path in sorted(_visible(checkpoint.folder))]
    rest = [path for path in files if str(path) not in shards]
    left = [path for path in rest if _holds_weights(path) or (str(path) == INDEX and shards == {WHOLE})]
    return [path for path in rest if path not in left], tuple(map(str, left))


def _visible(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if not path.name.startswith("."):
            yield from _visible(path) if path.is_dir() else (path,)


def _holds_weights(path: Path) -> bool:
    return path.suffix in WEIGHTS or (path.name.endswith(".index.json") and path.name != INDEX)
