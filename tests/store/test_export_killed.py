"""An export that is killed, or has nothing finite to write: the folder is the old one or the new one, whole."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from checks import Snapshot, adapters
from exports import SAMPLE, hand, tiny
from merging import contents, forked
from torch import nn

import graphpeft as gp
from graphpeft.errors import AdapterError, ExportError
from graphpeft.files.exchange import swap_dirs
from graphpeft.passes.export import export
from graphpeft.runtime import folder as exported_folder
from graphpeft.runtime.doctor import doctor
from graphpeft.runtime.folder import staged
from graphpeft.runtime.session import Session

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, so that each costs no imports")


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two exports that share no byte of their adapters."""
    folder, model = tmp_path_factory.mktemp("versions"), hand()
    for number in (1.0, 2.0):
        for parameter in adapters(model, "a").values():
            nn.init.constant_(parameter, number)
        export(model, folder / str(number), inputs=SAMPLE, verify="off")
    return [folder / "1.0", folder / "2.0"]


def check_whole(folder: Path, versions: list[Path]) -> int:
    """Which of the versions the folder is, to the byte."""
    assert {p.name for p in folder.iterdir()} == {p.name for p in versions[0].iterdir()}
    found = contents(folder)
    sizes = json.loads(found["graphpeft.json"])["files"]
    assert sizes == {name: len(data) for name, data in found.items() if name != "graphpeft.json"}
    return [contents(version) for version in versions].index(found)


def exporting(target: Path, versions: list[Path]) -> Callable[[], None]:
    """All that an export does to a folder, without the seconds of making the graph."""

    def run() -> None:
        for number in range(10**6):
            with staged(target) as fresh:
                shutil.copytree(versions[number % 2], fresh, dirs_exist_ok=True)

    return run


@forks
@pytest.mark.parametrize("exchanged", [True, False])
@pytest.mark.parametrize("kills", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_random(
    kills: int, exchanged: bool, versions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanged:  # as on a system that cannot do it in one step
        monkeypatch.setattr(exported_folder, "swap_dirs", lambda one, other: False)
    target = tmp_path / "deploy"
    shutil.copytree(versions[0], target)
    rng, found, away = random.Random(0), set(), 0
    # Under load a process may not come far: then there are more, and longer ones, until some did.
    for number in range(20 * kills):
        if number >= kills and len(found) == 2:
            break
        assert os.WIFSIGNALED(forked(exporting(target, versions), rng.uniform(0.005, 0.05 * (1 + number / kills))))
        away += not target.exists()
        session = Session(target)  # it finds the folder where the kill left it
        assert session.adapters == ("a",)
        found.add(check_whole(target, versions))
        left = {path.name.rpartition(".")[2] for path in tmp_path.iterdir()} - {"deploy"}
        assert len(list(tmp_path.iterdir())) <= 2 + ("old" in left), "what the kills before left is gone"
    with staged(target) as fresh:
        shutil.copytree(versions[0], fresh, dirs_exist_ok=True)
    assert [path.name for path in tmp_path.iterdir()] == ["deploy"]
    assert found == {0, 1}, "kills too early to have exported anything"
    assert not (exchanged and away), "the place is never empty"


@forks
@pytest.mark.parametrize("kills", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_a_real_export_is_killed(kills: int, versions: list[Path], tmp_path: Path) -> None:
    model, target = hand(), tmp_path / "deploy"
    start = time.perf_counter()
    assert forked(lambda: export(model, target, inputs=SAMPLE, verify="off")) == 0
    longest = time.perf_counter() - start
    before, rng = contents(target), random.Random(1)
    for _ in range(kills):
        forked(lambda: export(model, target, inputs=SAMPLE, verify="off"), rng.uniform(0, longest))
        now = contents(target)
        assert now.keys() == before.keys()
        same = {name for name in now if now[name] == before[name]}
        assert same == now.keys() or "graphpeft.json" not in same  # the new one says how long it took
        assert all(one.good for one in doctor(target))
    export(model, target, inputs=SAMPLE, verify="off")
    assert all(one.good for one in doctor(target))


def test_exports_to_one_place_leave_each_other_alone(versions: list[Path], tmp_path: Path) -> None:
    target, other = tmp_path / "deploy", tmp_path / ".deploy.mine"
    other.mkdir()
    with staged(target) as one:
        with staged(target) as two:
            assert one.exists()
            shutil.copytree(versions[1], two, dirs_exist_ok=True)
        assert check_whole(target, versions) == 1
        shutil.copytree(versions[0], one, dirs_exist_ok=True)
    assert check_whole(target, versions) == 0
    assert {path.name for path in tmp_path.iterdir()} == {target.name, other.name}


def test_a_kill_between_two_renames_is_put_right(versions: list[Path], tmp_path: Path) -> None:
    for number, find in enumerate((Session, doctor, lambda folder: staged(folder).__enter__())):
        target = tmp_path / str(number)
        shutil.copytree(versions[0], tmp_path / f".{number}.old")
        find(target)
        assert check_whole(target, versions) == 0
        assert not (tmp_path / f".{number}.old").exists()


def test_folders_exchange_names(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not swap_dirs(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["a"]
    with pytest.raises(FileNotFoundError):
        swap_dirs(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"merged": True}, {"compact": True}], ids=str)
def test_what_is_not_finite_is_not_exported(
    value: float, options: dict[str, bool], versions: list[Path], tmp_path: Path
) -> None:
    model, target = hand(), tmp_path / "deploy"
    shutil.copytree(versions[0], target)
    list(adapters(model, "a").values())[-1].data[0, 0] = value
    before = Snapshot.of(model)
    with pytest.raises((ExportError, AdapterError), match=r"(adapter 'a'.*wv|wv.*adapter 'a').*NaN or infinite"):
        export(model, target, inputs=SAMPLE, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["deploy"]
    assert check_whole(target, versions) == 0
    assert Snapshot.of(model).required == before.required


def test_what_half_precision_does_not_hold_is_not_merged_or_exported(tmp_path: Path) -> None:
    sample = {"x": SAMPLE["x"].half()}
    model = gp.apply(tiny("hand").half(), "qv:lora(r=2)", name="a", inputs=sample)  # the adapter is in float32
    for parameter in adapters(model, "a").values():
        nn.init.constant_(parameter, 300.0)
    before = Snapshot.of(model)
    with pytest.raises(AdapterError, match=r"wq plus the update has NaN or infinite values in float16"):
        gp.merge(model)
    before.check(model)
    for parameter in adapters(model, "a").values():
        nn.init.constant_(parameter, 1e5)
    with pytest.raises(ExportError, match="of adapter 'a' at wq has NaN or infinite values in float16"):
        export(model, tmp_path / "deploy", inputs=sample)
    assert not any(tmp_path.iterdir())
