"""Two processes with one thread each, which is how every figure here was made."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing.pool import Pool
from typing import TypeVar

from rich.progress import track

Job, Done = TypeVar("Job"), TypeVar("Done")


def parallel(work: Callable[[Job], Done], jobs: Sequence[Job], title: str) -> list[Done]:
    """`work` of every job, in the order of the jobs."""
    return list(track(_pool().imap(work, jobs), title, total=len(jobs)))


@cache
def _pool() -> Pool:
    """One for the whole run: what a process pretrained or computed, it keeps."""
    return multiprocessing.get_context("spawn").Pool(2, initializer=_start)


def _start() -> None:
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
