"""Files under fire: a kill at any moment of a save, and files that were changed by chance or on purpose."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from zoo import llama

import graphpeft as gp
from graphpeft.errors import FileError, GraphPeftError
from graphpeft.rewrite.state import chains
from graphpeft.store.native import DESCRIPTION, TENSORS, read_adapter

FORK = multiprocessing.get_context("fork") if "fork" in multiprocessing.get_all_start_methods() else None


def filled(value: float) -> nn.Module:
    """A model whose adapter holds nothing but one value."""
    torch.manual_seed(0)
    model = gp.apply(llama(), "qv:lora(r=64)", seed=int(value))
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        nn.init.constant_(parameter, value)
    return model


@pytest.mark.skipif(FORK is None, reason="this system does not fork")
@pytest.mark.parametrize("kills", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_a_kill_while_saving_leaves_the_old_adapter_or_the_new_one(kills: int, tmp_path: Path) -> None:
    models = [filled(1.0), filled(2.0)]
    folder = tmp_path / "adapter"
    gp.save(models[0], folder)

    def save_for_ever() -> None:
        for number in range(10**6):
            gp.save(models[number % 2], folder)

    rng = random.Random(0)
    found: list[int] = []
    # Under load a process may not come far: then there are more, and longer ones, until some did.
    for number in range(20 * kills):
        if number >= kills and len(set(found)) == 2:
            break
        child = FORK.Process(target=save_for_ever)  # type: ignore[union-attr]
        child.start()
        time.sleep(rng.uniform(0.01, 0.06 * (1 + number // kills)))
        os.kill(child.pid, signal.SIGKILL)  # type: ignore[arg-type]
        child.join()
        content = read_adapter(folder)
        values = {float(value) for tensor in content.tensors.values() for value in (tensor.min(), tensor.max())}
        assert values == {float(content.seed)}, "tensors of one adapter, description of the other"
        found.append(content.seed)
    assert set(found) == {1, 2}, "kills too early to have saved anything"
    gp.save(models[1], folder)
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {DESCRIPTION, TENSORS}
    restored = gp.load(_plain(), folder)
    assert all(float(p.min()) == 2.0 for chain in chains(restored, "default").values() for p in chain.parameters())


def _plain() -> nn.Module:
    torch.manual_seed(0)
    return llama()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gp.save(gp.apply(_plain(), "qv:lora(r=2); down:vera(r=4)"), tmp_path_factory.mktemp("saved") / "adapter")


def changed(data: bytes, rng: random.Random) -> bytes:
    """As by a bad disk, a cut transfer, an editor."""
    kind = rng.randrange(5)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    at = rng.randrange(len(data))
    if kind == 1:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + rng.randbytes(rng.randrange(1, 20)) + data[at:]
    if kind == 3:
        return data[:at] + data[at + rng.randrange(1, 40) :]
    return data[:at] + rng.randbytes(8) + data[at + 8 :]


ODD: list[Any] = [
    None,
    -1,
    0,
    2**70,
    1e308,
    "",
    "x" * 10_000,
    [],
    {},
    [[1, 2, 3]],
    True,
    [10**12, 10**12],
    "../../x",
    "q:lora(r=10**9)",
]


def edited(about: Any, rng: random.Random) -> Any:
    """The description with some value replaced or removed, anywhere in it."""
    about = copy.deepcopy(about)
    here = about
    while True:
        keys = list(here) if isinstance(here, dict) else range(len(here))
        key = rng.choice(list(keys))
        if isinstance(here[key], (dict, list)) and here[key] and rng.random() < 0.8:
            here = here[key]
            continue
        if isinstance(here, dict) and rng.random() < 0.3:
            del here[key]
        else:
            here[key] = rng.choice(ODD)
        return about


@pytest.mark.parametrize("files", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_changed_files_are_refused_or_harmless(files: int, saved: Path, tmp_path: Path) -> None:
    """Only our errors, and the model stays as it was. A digest that fits lets changed tensors through to the next check."""
    rng = random.Random(1)
    model = _plain()
    before = {name: p.clone() for name, p in model.named_parameters()}
    about, tensors = json.loads((saved / DESCRIPTION).read_bytes()), (saved / TENSORS).read_bytes()
    refused = 0
    for number in range(files):
        shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
        (tmp_path / "adapter").mkdir()
        way = number % 3
        data = changed(tensors, rng) if way == 0 else tensors
        text = json.dumps(
            {**about, "tensors_sha256": hashlib.sha256(data).hexdigest()} if way == 0 else edited(about, rng)
        ).encode()
        (tmp_path / "adapter" / TENSORS).write_bytes(data)
        (tmp_path / "adapter" / DESCRIPTION).write_bytes(changed(text, rng) if way == 2 else text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                gp.load(model, tmp_path / "adapter", "found")
                gp.remove(model, "found")
            except GraphPeftError:
                refused += 1
        assert not hasattr(model, "_graphpeft")
    assert refused > files / 3
    assert {name: p.shape for name, p in model.named_parameters()} == {name: p.shape for name, p in before.items()}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_sizes_are_checked_before_anything_is_made(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "adapter")
    about = json.loads((saved / DESCRIPTION).read_text())
    about["sites"][0]["method"] = "lora(r=1000000000)"
    (tmp_path / "adapter" / DESCRIPTION).write_text(json.dumps(about))
    with pytest.raises(FileError):
        gp.load(_plain(), tmp_path / "adapter")


def test_pickles_are_not_read(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "harmed"),)

    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter.bin", "adapter_model.bin", "pytorch_model.bin"):
        torch.save(Harm(), folder / name)
    with pytest.raises(FileError):
        gp.load(_plain(), folder)
    with contextlib.suppress(FileError):
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}')
        gp.load(_plain(), folder)
    assert not (tmp_path / "harmed").exists()
