"""What stands in the place of a file: pipes, devices, folders, links, other people's JSON. Our error, and soon."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from checks import build

import graphpeft as gp
from graphpeft.errors import FileError
from graphpeft.files import foreign
from graphpeft.files.foreign import read_json
from graphpeft.store.checkpoint import open_checkpoint
from graphpeft.store.merge_files import merge_files

FILES = {
    "graphpeft": ("adapter.json", "adapter.safetensors"),
    "peft": ("adapter_config.json", "adapter_model.safetensors"),
}
posix = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    model = gp.apply(build("llama"), "qv:lora(r=2)")
    folder = tmp_path_factory.mktemp("saved")
    return {format: gp.save(model, folder / format, format=format) for format in ("graphpeft", "peft")}  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 10


PLACES: dict[str, Callable[[Path], None]] = {
    "pipe": lambda path: os.mkfifo(path),
    "folder": lambda path: path.mkdir(),
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
    "nowhere": lambda path: path.symlink_to("absent"),
    "of the system": lambda path: path.symlink_to("/proc/self/maps"),
    "larger than memory": lambda path: path.symlink_to("/proc/kcore"),
    "link to a pipe": lambda path: (os.mkfifo(path.with_name("pipe")), path.symlink_to("pipe"))[1],
}


@posix
@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize(("format", "name"), [(f, name) for f, names in FILES.items() for name in names])
def test_in_place_of_a_file(kind: str, format: str, name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved[format], tmp_path / "adapter"))
    (folder / name).unlink()
    PLACES[kind](folder / name)
    model = build("llama")
    with pytest.raises(FileError, match="adapter"):
        gp.load(model, folder)
    assert not hasattr(model, "_graphpeft")


@posix
@pytest.mark.parametrize("name", FILES["graphpeft"])
def test_a_link_to_a_file_is_that_file(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    """As in the Hub's cache."""
    folder = Path(shutil.copytree(saved["graphpeft"], tmp_path / "adapter"))
    (folder / name).rename(tmp_path / "blob")
    (folder / name).symlink_to(tmp_path / "blob")
    gp.load(build("llama"), folder)


@posix
@pytest.mark.parametrize("place", ["/proc/self", "/dev/null", "/proc/self/maps", "/proc/self/fd"])
def test_in_place_of_a_folder(place: str) -> None:
    with pytest.raises(FileError, match=place):
        gp.load(build("llama"), place)
    with pytest.raises(FileError, match=rf"{place}.* was not written: .*Usually"):
        gp.save(gp.apply(build("llama"), "q:lora(r=2)"), f"{place}/x")


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 200_000, "[" * 200_000 + "]" * 200_000], ids=["[", "{", "[]"]
)
def test_deep_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(FileError, match=r"x\.json is not readable JSON: .*copy the folder again"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "content", ["[" + "[]," * 5_000_000 + "0]", '{"a": ' + "9" * 5_000_000 + "}"], ids=["many", "digits"]
)
def test_large_json(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(FileError, match=r"x\.json (has more than 4000000 values|is not readable JSON)"):
        read_json(tmp_path / "x.json")


def test_more_bytes_than_a_description_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "MOST_BYTES", 100)
    (tmp_path / "x.json").write_text(json.dumps("x" * 98))
    assert read_json(tmp_path / "x.json") == "x" * 98
    (tmp_path / "x.json").write_text(json.dumps("x" * 99))
    with pytest.raises(FileError, match=r"x\.json has more than 100 bytes.*another file.*Copy it again"):
        read_json(tmp_path / "x.json")


class Full:
    """A file on a full disk."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def write(self, data: bytes) -> None:
        self.file.write(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("format", FILES)
def test_a_full_disk(format: Any, saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(saved[format], tmp_path / "adapter"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = gp.apply(build("llama"), "up:lora(r=2)")
    real = Path.open

    def full(path: Path, mode: str = "r", *given: Any, **options: Any) -> Any:
        file = real(path, mode, *given, **options)
        return Full(file) if mode == "wb" else file

    monkeypatch.setattr(Path, "open", full)
    for place in (folder, tmp_path / "new"):
        with pytest.raises(
            FileError, match=rf"{place.name} was not written: No space left.*Usually the disk is full"
        ) as told:
            gp.save(model, place, format=format)
        assert isinstance(told.value, OSError)  # for callers who catch that
        assert told.value.errno == errno.ENOSPC
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@posix
@pytest.mark.parametrize("kind", ["pipe", "endless", "loop"])
def test_beside_a_checkpoint_that_is_merged(kind: str, saved: dict[str, Path], tmp_path: Path) -> None:
    """The other files of the base are copied: those that are files."""
    build("llama").save_pretrained(tmp_path / "base")
    PLACES[kind](tmp_path / "base" / "notes.txt")
    with pytest.raises(FileError, match=r"out could not be finished: .*notes\.txt"):
        merge_files(tmp_path / "base", saved["graphpeft"], tmp_path / "out", any_base=True)
    shard = tmp_path / "base" / "model.safetensors"
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(FileError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path / "base")


@posix
def test_a_checkpoint_whose_folder_holds_a_link_to_itself(saved: dict[str, Path], tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "again").symlink_to(".")
    merge_files(tmp_path / "base", saved["graphpeft"], tmp_path / "out", any_base=True)
    assert not (tmp_path / "out" / "again").exists()
