"""Models as functions of named tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exports import SAMPLE, ids, tiny
from torch import nn

from graphpeft.errors import ExportError
from graphpeft.flat import Flat


def test_equal_sizes_of_batch_and_sequence_are_refused() -> None:
    with pytest.raises(ExportError, match=r"batch size 4 and lengths \[4\]"):
        Flat.of(tiny("bert"), ids(4, 4))


def test_outputs_must_be_tensors() -> None:
    class Nested(nn.Module):
        def __init__(self, *kinds: str) -> None:
            super().__init__()
            self.kinds = kinds

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {kind: x if kind == "plain" else (x,) for kind in self.kinds}

    flat = Flat.of(Nested("plain", "cache"), SAMPLE)
    assert (flat.outputs, flat.dropped) == (("plain",), ("cache",))
    with pytest.raises(ExportError, match="Nested returns no tensor"):
        Flat.of(Nested("cache"), SAMPLE)
