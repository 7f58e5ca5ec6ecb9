"""Two processes that share a batch train as one does: the same losses, the same tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs


def test_two_processes_equal_one(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    here = Path(__file__).parent
    started = subprocess.Popen(
        [*command, str(here / "runs.py"), str(result)],
        env=os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here.parent.parent}", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    alone = runs.everything()
    _, errors = started.communicate(timeout=300)
    assert started.returncode == 0, errors[-3000:]
    shared = json.loads(result.read_text())
    assert shared.keys() == alone.keys()
    for kind, (losses, penalties, tensors) in alone.items():
        # float32: sums over halves of a batch, then over processes, of losses of size 5 and tensors of size 1.
        assert shared[kind][0] == pytest.approx(losses, abs=2e-5), kind
        assert shared[kind][1] == pytest.approx(penalties, abs=2e-4), kind
        for name, values in tensors.items():
            assert shared[kind][2][name] == pytest.approx(values, abs=2e-5), (kind, name)
