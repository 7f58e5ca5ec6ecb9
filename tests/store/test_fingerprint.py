"""The fingerprint of base weights: it notices other numbers anywhere, and files with that of earlier versions still load."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import graphpeft as gp
from graphpeft.errors import FileError
from graphpeft.store.checkpoint import open_checkpoint
from graphpeft.store.fingerprint import fingerprint, looked_at
from graphpeft.store.merge_files import merge_files

OLD = Path(__file__).parents[1] / "fixtures" / "0.1"


def of(weight: torch.Tensor, version: int = 2) -> str:
    return fingerprint(["w"], lambda _: weight, version)


SHAPES = [(64, 64), (128, 256), (4096, 11), (11, 4096), (1000, 1000), (256, 64, 3, 3), (8, 64, 128), (3,), (5000,)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_weight_that_is_mostly_another_is_another(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    other = torch.randn(shape, generator=generator)
    assert of(base) == of(base.clone())
    for axis, size in enumerate(shape):
        for kept in {0, size // 2, size - 1}:  # one row, one column
            mixed = other.clone()
            mixed.select(axis, kept).copy_(base.select(axis, kept))
            assert of(mixed) != of(base) or size == 1, (axis, kept)
        for part in range(4):  # a quarter of the rows, of the columns
            mixed = base.clone()
            some = slice(part * size // 4, (part + 1) * size // 4)
            mixed.narrow(axis, some.start, some.stop - some.start).copy_(
                other.narrow(axis, some.start, some.stop - some.start)
            )
            assert of(mixed) != of(base) or some.start == some.stop, (axis, part)


@pytest.mark.parametrize("count", [0, 1, 4096, 4097, 5000, 10**6, 2**24 + 1, 10**10])
def test_places_are_inside_and_apart(count: int) -> None:
    runs = looked_at(count, 2)
    ends = [0, *(begin + length for begin, length in runs)]
    assert all(begin >= end for (begin, _), end in zip(runs, ends, strict=False))
    assert ends[-1] <= count
    assert sum(length for _, length in runs) == min(count, 1024 if count > 4096 else 4096)


def test_a_base_with_other_numbers_in_most_columns_is_refused(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False))
    other, same = copy.deepcopy(base), copy.deepcopy(base).bfloat16()
    gp.save(gp.apply(base, "path(*):lora(r=2)", inputs=(torch.randn(4, 64),)), tmp_path)
    with torch.no_grad():
        for name in "02":
            other.get_submodule(name).weight[:, 1:].normal_()
    with pytest.raises(FileError, match="trained on other base weights"):
        gp.load(other, tmp_path)
    gp.load(same, tmp_path)


def test_what_an_earlier_version_wrote_is_compared_as_it_did_then(tmp_path: Path) -> None:
    weight = torch.arange(64 * 64.0).reshape(64, 64)
    told = json.loads((OLD / "adapter_pair" / "adapter.json").read_text())
    assert len(told["base_fingerprint"]) == 64
    # The digest that version 0.1 gave: of every 64th value.
    assert of(weight, 1) == "b896f32ab2fe463591bb37d02b6630063cca84d3dee8c54f43a3bb5ea7d59fa5"
    mixed = weight.clone()
    mixed[:, 1:] = 0
    assert of(mixed, 1) == of(weight, 1)
    assert of(mixed) != of(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_is_read_at_those_places_alone(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in (("a", (300, 64)), ("b", (7,)))}
    save_file(tensors, tmp_path / "model.safetensors")
    shard = open_checkpoint(tmp_path).where["a"]
    for version in (1, 2):
        found = fingerprint(tensors, lambda name, version=version: shard.glimpse(name, version), version)
        assert found == fingerprint(tensors, tensors.__getitem__, version)


def test_on_disk_as_in_memory(tmp_path: Path) -> None:
    """A merge of files compares with the same fingerprint, of either version."""
    from zoo import llama

    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base")
    folder = gp.save(gp.apply(model, "qv:lora(r=2)"), tmp_path / "adapter")
    about = json.loads((folder / "adapter.json").read_text())
    assert about["base_fingerprint"].startswith("2:")
    entries = gp.plan(llama(), "qv:lora(r=2)").entries
    weights = dict(model.named_parameters())
    old = fingerprint((e.site.weight for e in entries), lambda name: weights[name].detach(), 1)
    merge_files(tmp_path / "base", folder, tmp_path / "new")
    (folder / "adapter.json").write_text(json.dumps({**about, "base_fingerprint": old}))
    merge_files(tmp_path / "base", folder, tmp_path / "old")
    for wrong in ("0" * 64, "2:" + "0" * 64, old.replace(old[0], "2:" + old[0], 1)):
        (folder / "adapter.json").write_text(json.dumps({**about, "base_fingerprint": wrong}))
        with pytest.raises(FileError, match="trained on other base weights"):
            merge_files(tmp_path / "base", folder, tmp_path / "never")
        gp.remove(model) if hasattr(model, "_graphpeft") else None
        with pytest.raises(FileError, match="trained on other base weights"):
            gp.load(model, folder)
    shutil.rmtree(folder)
