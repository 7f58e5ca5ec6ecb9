"""A merge that is killed, at chosen and at random moments: the output is whole or not there, and a restart makes it whole."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from checks import build
from merging import Job, contents, forked, job_of, prepare

from graphpeft.errors import FileError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, so that each costs no imports")
WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return prepare(tmp_path_factory.mktemp("job"), build("llama", dtype=torch.bfloat16), "qv:lora; mlp:lora")


def die_at(moment: int, folder: Path) -> None:
    """Kill this process when it is about to change the folder for that many-th time: to open, rename or delete something."""
    seen = 0

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal seen
        opens = event == "open" and isinstance(args[1], str) and "w" in args[1]
        if (opens or event in WRITES) and str(args[0]).startswith(str(folder)):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed(found: Job, before: Callable[[], object] = lambda: None, kill_after: float | None = None) -> bool:
    """Merge in a process of its own; whether that was killed. An output that is there is whole."""

    def run() -> None:
        before()
        found.merge()

    status = forked(run, kill_after)
    assert os.WIFSIGNALED(status) or status == 0, "it failed by itself"
    if found.out.exists():
        assert contents(found.out) == found.expected
    return os.WIFSIGNALED(status)


def finished(found: Job) -> bool:
    return found.out.exists() and not found.note.exists()


def check_end(found: Job) -> None:
    assert contents(found.out) == found.expected
    assert not found.part.exists()
    assert not found.note.exists()


def test_killed_again_and_again_it_goes_on(job: Job, tmp_path: Path) -> None:
    """Every run comes a little further before it is killed."""
    found = job_of(job, tmp_path)
    runs = 0
    while killed(found, partial(die_at, 1 + 3 * runs, tmp_path)):
        runs += 1
        assert runs < 40
    assert runs >= 3
    check_end(found)


@pytest.mark.parametrize("moment", [2, 4, 9, 16])
def test_killed_once(moment: int, job: Job, tmp_path: Path) -> None:
    found = job_of(job, tmp_path)
    assert killed(found, partial(die_at, moment, tmp_path))
    assert not found.out.exists()
    finished = len([*found.part.glob("*.safetensors")])
    assert found.merge().kept == finished
    check_end(found)


def test_killed_when_nothing_but_tidying_was_left(job: Job, tmp_path: Path) -> None:
    found = job_of(job, tmp_path)
    moment = 16
    while not found.out.exists():
        shutil.rmtree(found.part, ignore_errors=True)
        found.note.unlink(missing_ok=True)
        moment += 1
        killed(found, partial(die_at, moment, tmp_path))
    assert found.note.exists()
    assert found.merge().kept == len([*job.base.glob("*.safetensors")])
    check_end(found)


def test_a_restart_with_something_else_is_refused(job: Job, tmp_path: Path) -> None:
    other = prepare(tmp_path / "other", build("llama", dtype=torch.bfloat16), "qv:lora", std=0.1)
    found = job_of(job, tmp_path, copied=True)
    assert killed(found, lambda: die_at(12, tmp_path))
    left = contents(found.part)
    with pytest.raises(
        FileError, match=r"out\.part is what a run left .* had another adapter\. Finish it .*, or delete"
    ):
        job_of(found, tmp_path, adapter=other.adapter).merge()
    shard = next(found.base.glob("*.safetensors"))
    before = shard.stat()
    os.utime(shard)
    with pytest.raises(FileError, match="had another base"):
        found.merge()
    assert contents(found.part) == left
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    found.merge()
    assert contents(found.out) == found.expected


def kill_at_random(job: Job, folder: Path, times: int) -> int:
    rng = random.Random(0)
    start = time.perf_counter()
    assert not killed(job_of(job, folder / "whole"))
    longest = time.perf_counter() - start
    count = rounds = 0
    while count < times:
        found = job_of(job, folder / str(rounds))
        while count < times and not finished(found):
            count += killed(found, kill_after=rng.uniform(0.0, longest))
        if not finished(found):
            found.merge()
        check_end(found)
        rounds += 1
        shutil.rmtree(folder / str(rounds - 1))
    return rounds


def test_killed_at_random(job: Job, tmp_path: Path) -> None:
    kill_at_random(job, tmp_path, 6)


@pytest.mark.slow
def test_killed_at_random_200_times(job: Job, tmp_path: Path) -> None:
    assert kill_at_random(job, tmp_path, 200) > 1


@pytest.mark.slow
def test_killed_at_every_change_of_the_folder(job: Job, tmp_path: Path) -> None:
    for moment in range(1, 200):
        found = job_of(job, tmp_path / str(moment))
        if not killed(found, partial(die_at, moment, found.out.parent)):
            break
        if not finished(found):
            found.merge()
        assert contents(found.out) == found.expected
    assert 20 < moment < 199


@pytest.mark.slow
def test_the_command_is_killed(job: Job, tmp_path: Path) -> None:
    found = job_of(job, tmp_path)
    command = [sys.executable, "-m", "graphpeft.cli.main", "merge", *map(str, (found.base, found.adapter, found.out))]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not [*found.part.glob("*.safetensors")]:
            time.sleep(0.001)
        process.kill()
    assert subprocess.run(command, check=False).returncode == (1 if process.returncode == 0 else 0)
    check_end(found)
