"""Merge on disk: a checkpoint and adapters in, a checkpoint out, one weight in memory at a time.

The result is built in the staging folder `out.part`, and renamed to `out` when it is complete. Each file there is written
under a temporary name, flushed and renamed, so a shard under its final name is finished: a run after a kill keeps it and
continues with the next. A note beside the folder records the sources; a run with other sources is refused. The merged
shards have the base's headers byte for byte, since no name, shape or dtype changes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from graphpeft.errors import AdapterError, FileError
from graphpeft.files import resumable as unfinished
from graphpeft.files.atomic import writing
from graphpeft.files.foreign import open_file
from graphpeft.store.checkpoint import INDEX, WHOLE, Checkpoint, Shard, Stored, open_checkpoint
from graphpeft.store.folding import Scratch, folded
from graphpeft.store.merge_plan import Updates, digest, plan_updates
from graphpeft.store.native import DESCRIPTION
from graphpeft.store.peft import config as peft_config
from graphpeft.tracing import as_pass, counted, step

CHUNK = 1 << 22
"""Bytes copied at a time."""
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".gguf"}
"""Suffixes of weight files. They are not copied: beside the merged weights they would hold another model."""


@dataclass(frozen=True)
class MergedFiles:
    """The result of `merge_files`."""

    out: Path
    tensors: int
    """Stored tensors that were changed."""
    shards: int
    kept: int
    """Shards that an interrupted earlier run had finished."""
    left_out: tuple[str, ...]
    """Files of the base folder that were not copied, because they hold weights in another format or an adapter."""

    def __str__(self) -> str:
        kept = f", {self.kept} of them finished by an earlier run" if self.kept else ""
        why = "not copied, because they hold weights of the base or an adapter"
        left = f"\n{why}: {', '.join(self.left_out)}" if self.left_out else ""
        return f"{self.out}: {self.tensors} tensors merged in {self.shards} files{kept}{left}"


@as_pass("merge-files", "fold adapters into a checkpoint on disk")
def merge_files(
    base: str | Path, adapter: str | Path | Sequence[str | Path], out: str | Path, *, any_base: bool = False
) -> MergedFiles:
    """Fold adapters into a checkpoint on disk, without building the model.

    Args:
        base: a folder of a transformers model in safetensors, one file or shards.
        adapter: a folder that `gp.save` or PEFT wrote, or several, folded in this order.
        out: a new folder. It appears when it is complete; until then the work is in `out.part`, and the same call after a
            kill continues from there. Shards, names, dtypes and metadata are the base's; its tokenizer and configs are
            copied.
        any_base: only warn if an adapter was trained on other base weights.

    Every weight is bit-identical to what `gp.merge` computes in a model of the checkpoint's dtype.

    Raises:
        FileError: a file is missing or damaged, an adapter does not fit, `out` exists, an earlier run had other sources, the
            disk is full (finished shards are kept), or transformers builds an adapted weight from several stored tensors.
        AdapterError: a merged weight is not finite, or an adapter cannot be folded.
    """
    base, out = Path(base).resolve(), Path(out).resolve()
    folders = [Path(each) for each in ([adapter] if isinstance(adapter, str | Path) else adapter)]
    if not out.name:
        raise FileError(f"{out} cannot be an output folder. Name a new one.")
    if base in out.parents:
        raise FileError(f"{out} is inside {base}, whose files are copied. Name a folder elsewhere.")
    checkpoint = open_checkpoint(base)
    updates = plan_updates(checkpoint, folders, any_base)
    sources = {"base": checkpoint.digest(), "adapter": "+".join(map(digest, folders))}
    others, left_out = _others(checkpoint)
    count, kept, scratch = len(updates), 0, Scratch()
    try:
        folder = unfinished.begin(out, sources)
        if folder is not None:
            kept = sum(_finished(folder, shard) for shard in checkpoint.shards)
            for shard in checkpoint.shards:
                if not _finished(folder, shard):
                    _write(shard, folder, updates, scratch)
            for path in others:
                with writing(folder / path) as file, open_file(base / path) as source:
                    shutil.copyfileobj(source, file, CHUNK)
            unfinished.finish(out)
    except AdapterError:
        unfinished.discard(out)  # running again would fail the same way
        raise
    except OSError as error:
        raise FileError(
            f"{out} could not be finished: {error}. Finished files stay in {out.name}.part: free disk space, or fix the named "
            f"problem, and run the same command again."
        ) from error
    return MergedFiles(out, count, len(checkpoint.shards), len(checkpoint.shards) if folder is None else kept, left_out)


def _finished(folder: Path, shard: Shard) -> bool:
    path = folder / shard.path.name
    return path.is_file() and path.stat().st_size == shard.size


def _write(shard: Shard, folder: Path, updates: Updates, scratch: Scratch) -> None:
    with (
        step(shard.path.name),
        writing(folder / shard.path.name) as file,
        unfinished.background_writer(file) as write,
        shard.path.open("rb") as source,
    ):
        write(shard.header)
        for name, place in counted(list(shard.tensors.items())):
            if name in updates:
                for block in folded(name, shard.tensor(name), updates.pop(name), scratch):
                    write(block.view(torch.uint8).numpy().data)
            else:
                for data in _bytes(source, place):
                    write(data)


def _bytes(source: BinaryIO, place: Stored) -> Iterator[bytes]:
    """A stored tensor's bytes, chunk by chunk."""
    source.seek(place.begin)
    for begin in range(place.begin, place.end, CHUNK):
        data = source.read(min(CHUNK, place.end - begin))
        if len(data) < min(CHUNK, place.end - begin):
            raise OSError(f"{source.name} became shorter while it was read")
        yield data


def _others(checkpoint: Checkpoint) -> tuple[list[Path], tuple[str, ...]]:
    """Other files of the folder: to copy and to leave out. The index is copied, because no name or size changes."""
    shards = {shard.path.name for shard in checkpoint.shards}
    files = [path.relative_to(checkpoint.folder) for path in sorted(_visible(checkpoint.folder))]
    rest = [path for path in files if str(path) not in shards]
    left = [path for path in rest if _holds_weights(path) or (str(path) == INDEX and shards == {WHOLE})]
    return [path for path in rest if path not in left], tuple(map(str, left))


def _visible(folder: Path, inside: tuple[Path, ...] = ()) -> Iterator[Path]:
    """All files below a folder whose names do not begin with a dot. A link to a folder around it is left out."""
    around = (*inside, folder.resolve())
    for path in folder.iterdir():
        if path.name.startswith(".") or (path.is_symlink() and path.is_dir() and path.resolve() in around):
            continue
        yield from _visible(path, around) if path.is_dir() else (path,)


def _holds_weights(path: Path) -> bool:
    """Whether a file holds base weights in another format, or an adapter, which a loader would apply a second time."""
    if str(path) in (peft_config.CONFIG, DESCRIPTION):
        return True
    return path.suffix in WEIGHTS or (path.name.endswith(".index.json") and path.name != INDEX)
