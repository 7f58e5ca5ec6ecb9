"""The two files of an adapter are replaced as one: after a kill, beside other writers, and for PEFT as a reader."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from checks import build, call, outputs, randomize
from safetensors import safe_open
from safetensors.torch import load
from torch import nn

import graphpeft as gp
from graphpeft.errors import FileError
from graphpeft.files import pair as pairs
from graphpeft.files.pair import Pair
from graphpeft.store import native
from graphpeft.store.peft import files as peft_files

FORK = multiprocessing.get_context("fork") if "fork" in multiprocessing.get_all_start_methods() else None
forks = pytest.mark.skipif(FORK is None, reason="this system does not fork")
formats = pytest.mark.parametrize("format", ["graphpeft", "peft"])
exchanged = pytest.mark.parametrize("exchanged", [True, False], ids=["exchanged", "in place"])
PAIRS = {"graphpeft": native.PAIR, "peft": peft_files.PAIR}


@pytest.fixture
def way(exchanged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchanged:  # as on a system that cannot do it in one step
        monkeypatch.setattr(pairs, "swap_dirs", lambda one, other: False)


class Two:
    """A model with two adapters that differ in every number, and what the model computes with each."""

    def __init__(self) -> None:
        self.model = build("llama")
        self.call = call("llama", self.model)
        for name, alpha in (("one", 4), ("two", 64)):
            gp.apply(self.model, f"qv:lora(r=4, alpha={alpha})", name=name)
            randomize(self.model, name, seed=alpha)
        self.want, self.files = {}, {}
        for name in ("one", "two"):
            gp.activate(self.model, name)
            self.want[name] = self.of(self.model)

    def saved(self, folder: Path, format: str) -> str:
        """Which adapter a folder has, to the byte, for every reader that takes data by their own name or by `find`."""
        pair = PAIRS[format]
        files = {name: self.written(name, format) for name in ("one", "two")}
        name = next(name for name, (head, _) in files.items() if (folder / pair.head).read_bytes() == head)
        assert pair.find(folder).read_bytes() == files[name][1]
        assert not (folder / pair.data).exists() or (folder / pair.data).read_bytes() == files[name][1]
        return name

    def written(self, name: str, format: str) -> tuple[bytes, bytes]:
        """What a save writes."""
        if (name, format) not in self.files:
            with tempfile.TemporaryDirectory() as folder:
                gp.save(self.model, folder, name, format=format)  # type: ignore[arg-type]
                pair = PAIRS[format]
                self.files[name, format] = tuple((Path(folder) / each).read_bytes() for each in (pair.head, pair.data))
        return self.files[name, format]

    def of(self, model: nn.Module) -> torch.Tensor:
        return outputs(model, self.call)[0]

    def which(self, model: nn.Module) -> str:
        """Which adapter a model has. An adapter of both would be neither."""
        found = self.of(model)
        return next(name for name, want in self.want.items() if torch.allclose(found, want, atol=1e-5))


@pytest.fixture(scope="module")
def two() -> Two:
    return Two()


STOPS = range(30)
"""More than a save has steps."""


class Stopped(BaseException):
    """As a kill, at a step that the test chooses: what comes after it to tidy up does not happen either."""


def stopped_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """From this step on nothing changes the disk. Returns whether the step came."""
    count = [0]

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def act(*given: object, **options: object) -> object:
            count[0] += 1
            if count[0] > step:
                raise Stopped
            return real(*given, **options)

        return act

    for name in ("replace", "rename", "unlink"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))
    monkeypatch.setattr(pairs, "swap_dirs", counted(pairs.swap_dirs))
    return lambda: count[0] > step


@formats
@exchanged
def test_stopped_at_every_step(format: str, way: None, two: Two, tmp_path: Path) -> None:
    """Both readers find the old adapter or the new one. In place, there is a moment at which PEFT finds none."""
    met = set()
    for step in STOPS:
        folder = tmp_path / str(step) / "adapter"
        PAIRS[format].write(folder, *two.written("one", format))
        (folder / "README.md").write_text("mine")
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stopped):
            came = stopped_at(step, patch)
            PAIRS[format].write(folder, *two.written("two", format))
        found = two.saved(folder, format)
        met.add(found)
        assert (folder / "README.md").read_text() == "mine"
        # The next save is whole, and leaves nothing.
        PAIRS[format].write(folder, *two.written("one", format))
        assert two.saved(folder, format) == "one"
        assert {path.name for path in folder.iterdir()} == {PAIRS[format].head, PAIRS[format].data, "README.md"}
        assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
        if not came():
            break
    else:
        raise AssertionError("a save has more steps than were tried")
    assert met == {"one", "two"}
    assert two.which(gp.load(build("llama"), folder, "found")) == "one"
    if format == "peft":
        assert two.which(peft.PeftModel.from_pretrained(build("llama"), folder)) == "one"


@forks
@formats
@exchanged
def test_killed_at_random_while_two_processes_save(format: str, way: None, two: Two, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    gp.save(two.model, folder, "one", format=format)  # type: ignore[arg-type]

    def save_for_ever(first: int) -> None:
        for number in range(first, 10**6):
            name = ("one", "two")[number % 2]
            PAIRS[format].write(folder, *two.written(name, format))

    rng, found = random.Random(0), set()
    for number in range(300):
        if number >= 20 and len(found) == 2:
            break
        children = [FORK.Process(target=save_for_ever, args=(first,)) for first in (0, 1)]  # type: ignore[union-attr]
        for child in children:
            child.start()
        time.sleep(rng.uniform(0.01, 0.05))
        for child in children:
            os.kill(child.pid, signal.SIGKILL)  # type: ignore[arg-type]
            child.join()
        found.add(two.saved(folder, format))
    assert found == {"one", "two"}, "kills too early to have saved anything"
    gp.save(two.model, folder, "one", format=format)  # type: ignore[arg-type]
    assert {path.name for path in folder.iterdir()} == {PAIRS[format].head, PAIRS[format].data}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@forks
@formats
@exchanged
def test_saves_beside_each_other_are_whole_and_readers_meet_whole_adapters(
    format: str, way: None, two: Two, tmp_path: Path
) -> None:
    """Also to a folder that nobody has made yet."""
    folder = tmp_path / "deep" / "adapter"

    def save_often(name: str) -> None:
        for _ in range(10):
            gp.save(two.model, folder, name, format=format)  # type: ignore[arg-type]

    children = [FORK.Process(target=save_often, args=(name,)) for name in ("one", "two")]  # type: ignore[union-attr]
    for child in children:
        child.start()
    while not folder.exists() and any(child.is_alive() for child in children):
        time.sleep(0.001)
    read = 0
    while any(child.is_alive() for child in children):
        assert two.which(gp.load(build("llama"), folder, "found")) in ("one", "two")
        read += 1
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert read
    assert {path.name for path in folder.iterdir()} == {PAIRS[format].head, PAIRS[format].data}


def test_a_config_that_was_edited_by_hand_still_loads(two: Two, tmp_path: Path) -> None:
    gp.save(two.model, tmp_path, "one", format="peft")
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "elsewhere"}))
    assert two.which(gp.load(build("llama"), tmp_path)) == "one"


def test_a_folder_of_peft_is_replaced_whole(two: Two, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors name no config, so they are recognized by what is beside them."""
    monkeypatch.setattr(pairs, "swap_dirs", lambda one, other: False)
    theirs, folder = tmp_path / "theirs", tmp_path / "adapter"
    gp.save(two.model, theirs, "one", format="peft")
    peft.PeftModel.from_pretrained(build("llama"), theirs).save_pretrained(folder)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert peft_files.DIGEST not in (file.metadata() or {})
    wanted = {name: load(two.written(name, "peft")[1]) for name in ("one", "two")}
    before, met = {path.name: path.read_bytes() for path in folder.iterdir()}, set()
    for step in STOPS:
        shutil.rmtree(folder)
        folder.mkdir()
        for name, data in before.items():
            (folder / name).write_bytes(data)
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stopped):
            came = stopped_at(step, patch)
            PAIRS["peft"].write(folder, *two.written("two", "peft"))
        config, tensors = peft_files.read_both(folder)
        found = {4: "one", 64: "two"}[config["lora_alpha"]]
        assert all(torch.equal(tensor, wanted[found][key]) for key, tensor in tensors.items())
        met.add(found)
        if not came():
            break
    assert met == {"one", "two"}


@exchanged
def test_what_else_is_in_the_folder_stays(way: None, two: Two, tmp_path: Path) -> None:
    """Other files, links, a folder, the mode; and a link to the folder stays a link."""
    folder, link = tmp_path / "adapter", tmp_path / "link"
    gp.save(two.model, folder, "one")
    (folder / "notes.txt").write_text("mine")
    (folder / "broken").symlink_to("nowhere")
    folder.chmod(0o750)
    link.symlink_to(folder)
    gp.save(two.model, link, "two")
    assert link.is_symlink()
    assert (folder / "broken").is_symlink()
    assert folder.stat().st_mode & 0o777 == 0o750
    (folder / "checkpoint").mkdir()
    gp.save(two.model, folder, "one")
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter.json", "adapter.safetensors", "broken", "checkpoint", "notes.txt",
    ]  # fmt: skip
    assert two.which(gp.load(build("llama"), folder, "found")) == "one"


def test_the_folder_in_which_a_process_works_stays(two: Two, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gp.save(two.model, tmp_path, "one")
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat().st_ino
    gp.save(two.model, ".", "two")
    assert Path.cwd().stat().st_ino == before == tmp_path.stat().st_ino
    assert two.which(gp.load(build("llama"), ".", "found")) == "two"


def test_everything_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data and the names in the folder are flushed before the exchange, and the name of the folder after it."""
    done: list[str] = []
    real_fsync, real_swap = os.fsync, pairs.swap_dirs
    place = {}

    def fsync(handle: int) -> None:
        real_fsync(handle)
        about = os.fstat(handle)
        done.append(place.get(about.st_ino, "folder" if about.st_mode & 0o040000 else "file"))

    def swap(one: Path, other: Path) -> bool:
        done.append("swap")
        return real_swap(one, other)

    pair = Pair("head", "data", lambda head, data: True)
    pair.write(tmp_path / "a", b"1", b"1")
    place[tmp_path.stat().st_ino] = "parent"
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(pairs, "swap_dirs", swap)
    pair.write(tmp_path / "a", b"2", b"2")
    if not done.count("swap"):
        pytest.skip("this file system cannot exchange folders")
    at = done.index("swap")
    assert done[:at].count("file") == 2
    assert done[at - 1] == "folder"
    assert "parent" in done[at:]


def test_a_link_that_leads_nowhere_and_a_file_in_the_way(two: Two, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("file", "file/below", "loop"):
        with pytest.raises(FileError, match=rf"{name} was not written: .*Usually.*Make room, or name another place"):
            gp.save(two.model, tmp_path / name, "one")
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]
