"""Two processes that share a batch train as one does: the same losses, the same tensors, whole or in shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import runs
import sharded
from safetensors.torch import load_file

HERE = Path(__file__).parent
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """What one process and two found, and the folder of what each saved: under `alone`, and under `together`."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "together").mkdir()
    started = subprocess.Popen(
        [sys.executable, "-m", *TORCHRUN, str(HERE / "processes.py"), str(folder / "together")],
        env=os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE.parent.parent}", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    alone = {"whole": runs.everything(), "sharded": sharded.everything(folder / "alone")}
    _, errors = started.communicate(timeout=300)
    assert started.returncode == 0, errors[-3000:]
    return alone, json.loads((folder / "together" / "result.json").read_text()), folder


def test_two_processes_equal_one(both: tuple[dict[str, Any], dict[str, Any], Path]) -> None:
    alone, shared = both[0]["whole"], both[1]["whole"]
    assert shared.keys() == alone.keys()
    for kind, (losses, penalties, tensors) in alone.items():
        # float32: sums over halves of a batch, then over processes, of losses of size 5 and tensors of size 1.
        assert shared[kind][0] == pytest.approx(losses, abs=2e-5), kind
        assert shared[kind][1] == pytest.approx(penalties, abs=2e-4), kind
        for name, values in tensors.items():
            assert shared[kind][2][name] == pytest.approx(values, abs=2e-5), (kind, name)


CLOSE = {"bfloat16": 1e-3, "policy": 2e-2}
"""Rounding of losses of size 5: activations in bfloat16, of 8 bits; and then adapters too. Otherwise sums in float32."""


@pytest.mark.parametrize("kind", [*sharded.KINDS, "penalized"])
def test_sharded_models_equal_whole_ones(kind: str, both: tuple[dict[str, Any], dict[str, Any], Path]) -> None:
    alone, shared = both[0]["sharded"][kind], both[1]["sharded"][kind]
    assert shared.keys() == alone.keys()
    for stage, values in alone.items():
        assert shared[stage] == pytest.approx(values, abs=CLOSE.get(kind, 2e-5)), stage


@pytest.mark.parametrize("kind", sharded.KINDS)
def test_sharded_adapters_are_saved_whole(kind: str, both: tuple[dict[str, Any], dict[str, Any], Path]) -> None:
    one, two = (load_file(both[2] / who / kind / "adapter.safetensors") for who in ("alone", "together"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert two[name].dtype == tensor.dtype
        assert (two[name] - tensor).abs().max() < CLOSE.get(kind, 2e-5), name
    descriptions = [json.loads((both[2] / who / kind / "adapter.json").read_text()) for who in ("alone", "together")]
    for about in descriptions:
        del about["tensors_sha256"]
    assert descriptions[0] == descriptions[1]  # the base's fingerprint among it
