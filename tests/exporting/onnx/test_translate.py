"""What is borrowed from transformers for tracing is still there, and does what it is borrowed for."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from graphpeft.compat import transformers_export as hf


def test_translations_and_patches_are_where_they_were() -> None:
    attention = F.scaled_dot_product_attention
    with hf.translating() as table:
        assert torch.ops.aten.index_put.default in table
        assert F.scaled_dot_product_attention is not attention
    assert F.scaled_dot_product_attention is attention


def test_a_row_that_sees_nothing_attends_to_nothing() -> None:
    """Padding on the left leaves such rows; ONNX Runtime would take a softmax of nothing and spread NaN."""
    q, k, v = torch.randn(3, 1, 2, 3, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    mask[..., 0, :] = False
    with hf.translating():
        found = F.scaled_dot_product_attention(q, k, v, mask)
    assert torch.equal(found[:, :, 0], torch.zeros(1, 2, 4))
    assert found[:, :, 1:].abs().min() > 0
