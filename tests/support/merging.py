"""What the tests of merges on disk share: a base, an adapter and what is expected, as folders; a process of their own."""

from __future__ import annotations

import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from checks import randomize
from torch import nn

import graphpeft as gp
from graphpeft.passes.save import Format
from graphpeft.store.merge_files import MergedFiles


@dataclass(frozen=True)
class Job:
    base: Path
    adapter: Path
    out: Path
    expected: dict[str, bytes]
    """Files of a merge in memory, saved."""

    @property
    def part(self) -> Path:
        return self.out.with_name("out.part")

    @property
    def note(self) -> Path:
        return self.out.with_name("out.part.json")

    def merge(self, **options: Any) -> MergedFiles:
        inside = self.out if not (self.base / "inside").exists() else self.base / "out"
        return gp.merge_files(self.base, self.adapter, inside, **options)

    def inside(self) -> None:
        """Have the output go into the base's own folder."""
        (self.base / "inside").touch()

    def occupy(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")


def prepare(
    folder: Path,
    model: nn.Module,
    rules: str,
    *,
    shards: bool = True,
    std: float = 0.05,
    spoil: Callable[[nn.Module], None] | None = None,
    format: Format = "graphpeft",
) -> Job:
    """Save a base and an adapter of random numbers; merge in memory and save that, unless the adapter is spoiled."""
    layout = {"max_shard_size": "80KB"} if shards else {}
    model.save_pretrained(folder / "base", **layout)
    gp.apply(model, rules)
    randomize(model, std=std)
    if spoil is not None:
        spoil(model)
    gp.save(model, folder / "adapter", format=format)
    if format == "peft":  # what it says, which may be several sites in one
        gp.remove(model)
        gp.load(model, folder / "adapter")
    if spoil is None:
        gp.merge(model)
        model.save_pretrained(folder / "expected", **layout)
    return Job(folder / "base", folder / "adapter", folder / "out", contents(folder / "expected"))


def job_of(job: Job, folder: Path, copied: bool = False, adapter: Path | None = None) -> Job:
    """The same merge with its output elsewhere; `copied` with folders of its own, to be changed."""
    folder.mkdir(exist_ok=True)
    if copied:
        shutil.copytree(job.base, folder / "base")
        shutil.copytree(job.adapter, folder / "adapter")
        job = replace(job, base=folder / "base", adapter=folder / "adapter")
    return replace(job, out=folder / "out", adapter=adapter or job.adapter)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def forked(call: Callable[[], object], kill_after: float | None = None) -> int:
    """Run in a process of its own, which has imported everything already; its status as `os.waitpid` gives it.

    `kill_after` so many seconds it gets a SIGKILL, if it still runs.
    """
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # threads stay behind in a fork, and a product that waits for them waits forever
            call()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]
