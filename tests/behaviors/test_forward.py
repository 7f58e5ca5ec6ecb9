"""What an adapter does to a forward pass, and what disabling it leaves: B1 to B3, B18 and B20 of PEFT's tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from checks import adapters, same
from grid import HAND_MADE, Cell, apply, cells, close, fresh, run

import graphpeft as gp


@cells()
def test_b01_a_fresh_adapter_is_the_base(cell: Cell) -> None:
    """To the bit, also for the methods that start from a decomposition of the weight. PEFT allows 1e-4."""
    assert same(cell.run(cell.untrained()), cell.run(cell.base()))


@cells()
def test_b02_random_numbers_in_the_adapter_move_the_output(cell: Cell) -> None:
    # PEFT asks for more than 1e-5; a hundred times that is above any rounding here.
    assert not close(cell.run(cell.adapted()), cell.run(cell.base()), 1e-3)


@cells()
def test_b03_disabling_gives_the_base_and_leaving_gives_the_adapter_back(cell: Cell) -> None:
    """To the bit. PEFT allows 1e-6."""
    model = cell.adapted()
    adapted = cell.run(model)
    with gp.disabled(model):
        assert same(cell.run(model), cell.run(cell.base()))
    assert same(cell.run(model), adapted)
    gp.activate(model, None)
    assert same(cell.run(model), cell.run(cell.base()))
    gp.activate(model, "default")
    assert same(cell.run(model), adapted)


@pytest.mark.parametrize(
    "name", ["llama", "t5", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "bert"))]
)
def test_b18_one_layer_of_two_trains_half_and_is_loaded_as_such(name: str, tmp_path: Path) -> None:
    """PEFT says `layers_to_transform=[0]`."""
    both, model = (apply(name, fresh(name), f"{target}:lora") for target in ("qv", "qv[layers=0]"))
    assert 2 * gp.trainable(model)[0] == gp.trainable(both)[0]
    assert {re.findall(r"\d+", path)[0] for path in adapters(model)} == {"0"}
    adapted = run(name, model)
    assert not close(adapted, run(name, fresh(name)), 1e-3)
    gp.save(model, tmp_path)
    again = gp.load(fresh(name), tmp_path)
    assert same(run(name, again), adapted)
    assert gp.trainable(again) == gp.trainable(model)


HALF = {torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Dtypes and the distance of two neighbors at 1."""


@pytest.mark.parametrize("dtype", HALF, ids=["fp16", "bf16"])
@cells(HAND_MADE)
def test_b20_a_base_in_half_precision(cell: Cell, dtype: torch.dtype) -> None:
    """Adapters are float32 there, as PEFT's are unless `autocast_adapter_dtype=False`; `model.to` casts them, too."""
    model, expected = cell.adapted(dtype, std=0.1), cell.run(cell.adapted(std=0.1))
    for adapter in (torch.float32, dtype):
        assert {p.dtype for p in adapters(model).values()} == {adapter}
        found = cell.run(model)
        assert {t.dtype for t in found} == {dtype}
        # Some ten roundings on top of one another, of numbers up to the largest.
        limit = 10 * HALF[dtype] * max(1.0, *(float(t.abs().max()) for t in expected))
        assert all((a - b).abs().max() < limit for a, b in zip(found, expected, strict=True))
        with gp.disabled(model):
            assert not same(cell.run(model), found)
        model.to(dtype)
