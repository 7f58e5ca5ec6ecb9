"""The oldest ONNX Runtime that ran exports of each opset, measured by `python benchmarks/old_runtimes.py`.

1.20 is the first version with adapters. Opset 23 fails to load up to 1.22.1, opset 22 in 1.20.1.
"""

from __future__ import annotations

OLDEST = {18: "1.20.1", 19: "1.20.1", 20: "1.20.1", 21: "1.20.1", 22: "1.22.1", 23: "1.23.0"}


def oldest(opset: int) -> str:
    """The oldest version that passed the test; "" for an opset that was not tested."""
    return OLDEST.get(opset, "")
