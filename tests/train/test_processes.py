"""Two processes that share a batch train as one does: the same losses, the same tensors, whole or in shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import runs
import sharded
from safetensors.torch import load_file

HERE = Path(__file__).parents[1] / "support"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def both(folder: Path, kinds: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """What one process and two found, and the folder of what each saved: under `alone`, and under `together`."""
    (folder / "together").mkdir()
    started = subprocess.Popen(
        [sys.executable, "-m", *TORCHRUN, str(HERE / "processes.py"), str(folder / "together"), *kinds],
        env=os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    alone = {"whole": runs.everything(), "sharded": sharded.everything(folder / "alone", kinds)}
    _, errors = started.communicate(timeout=300)
    assert started.returncode == 0, errors[-3000:]
    return alone, json.loads((folder / "together" / "result.json").read_text()), folder


@pytest.mark.parametrize(
    "kinds", [sharded.OFTEN, pytest.param((*sharded.KINDS,), marks=pytest.mark.slow)], ids=["often", "all"]
)
def test_two_processes_equal_one(kinds: Sequence[str], tmp_path: Path) -> None:
    """In one test, for the runs take long and all serve the three."""
    alone, together, folder = both(tmp_path, kinds)
    check_whole(alone["whole"], together["whole"])
    for kind in (*kinds, "penalized", "flat"):
        check_sharded(kind, alone["sharded"][kind], together["sharded"][kind])
    for kind in kinds:
        check_files(kind, folder)


def check_whole(alone: dict[str, Any], shared: dict[str, Any]) -> None:
    assert shared.keys() == alone.keys()
    for kind, (losses, penalties, tensors) in alone.items():
        # float32: sums over halves of a batch, then over processes, of losses of size 5 and tensors of size 1.
        assert shared[kind][0] == pytest.approx(losses, abs=2e-5), kind
        assert shared[kind][1] == pytest.approx(penalties, abs=2e-4), kind
        for name, values in tensors.items():
            assert shared[kind][2][name] == pytest.approx(values, abs=2e-5), (kind, name)


CLOSE = {"bfloat16": 1e-3, "policy": 2e-2}
"""Rounding of losses of size 5: activations in bfloat16, of 8 bits; and then adapters too. Otherwise sums in float32."""


def check_sharded(kind: str, alone: dict[str, Any], shared: dict[str, Any]) -> None:
    assert shared.keys() == alone.keys()
    for stage, values in alone.items():
        assert shared[stage] == pytest.approx(values, abs=CLOSE.get(kind, 2e-5)), (kind, stage)


def check_files(kind: str, folder: Path) -> None:
    """Sharded adapters are saved whole."""
    one, two = (load_file(folder / who / kind / "adapter.safetensors") for who in ("alone", "together"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert two[name].dtype == tensor.dtype
        assert (two[name] - tensor).abs().max() < CLOSE.get(kind, 2e-5), name
    descriptions = [json.loads((folder / who / kind / "adapter.json").read_text()) for who in ("alone", "together")]
    for about in descriptions:
        del about["tensors_sha256"]
    assert descriptions[0] == descriptions[1]  # the base's fingerprint among it
