"""What can be said of one node alone: element-wise, per channel, numbers or indices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from graphpeft.match.operators import activation, depthwise, floating, partial, pointwise, strip
from graphpeft.match.products import op

W = torch.randn(8, 1, 3)


class Code(nn.Module):
    def __init__(self, code: Callable[..., object]) -> None:
        super().__init__()
        self.code = code

    def forward(self, x: Tensor) -> object:
        return self.code(x)


def last(code: Callable[..., object]) -> fx.Node:
    """The node that makes what `code` returns of a tensor of shape (2, 5, 8), with its meta data."""
    graph = torch.export.export(Code(code), (torch.randn(2, 5, 8),), strict=False).graph
    return next(n for n in reversed(graph.nodes) if n.op == "call_function")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (lambda x: F.silu(x), True),
        (lambda x: F.softplus(x), True),
        (lambda x: x + 1, True),
        (lambda x: torch.where(x > 0, x, x.neg()), True),
        (lambda x: x.cumsum(1), False),
        (lambda x: torch.softmax(x, -1), False),
        (lambda x: x.view(10, 8), False),
        (lambda x: x @ x.mT, False),
    ],
)
def test_pointwise(code: Callable[..., object], expected: bool) -> None:
    assert pointwise(last(code)) is expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (lambda x: torch.sigmoid(x), True),
        (lambda x: x.pow(2), True),
        (lambda x: x.exp(), True),
        (lambda x: x.clamp(-1, 1), False),
        (lambda x: x * 2, False),
        (lambda x: x.masked_fill(x > 0, 0.0), False),
        (lambda x: torch.softmax(x, -1), False),
    ],
)
def test_an_activation_is_not_linear(code: Callable[..., object], expected: bool) -> None:
    assert activation(last(code)) is expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (lambda x: x * 2, True),
        (lambda x: torch.view_as_complex(x.unflatten(-1, (4, 2))), True),
        (lambda x: x > 0, False),
        (lambda x: x.argmax(-1), False),
        (lambda x: x.long(), False),
    ],
)
def test_floating(code: Callable[..., object], expected: bool) -> None:
    assert floating(last(code)) is expected


def test_several_results_count_if_one_is_a_number() -> None:
    node = next(n for n in last(lambda x: x.topk(2).values).all_input_nodes if op(n) == "topk")
    assert floating(node)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (lambda x: F.conv1d(x.mT, W, groups=8), True),
        (lambda x: F.conv1d(x.mT, torch.randn(16, 1, 3), groups=8), False),  # two filters for each channel
        (lambda x: F.conv1d(x.mT, torch.randn(8, 8, 3)), False),
        (lambda x: F.conv1d(x.mT, torch.randn(8, 2, 1), groups=4), False),
        (lambda x: F.conv1d(x.mT[:, :1], torch.randn(1, 1, 3)), False),  # one channel: groups=1 says nothing
        (lambda x: x * 2, False),
    ],
)
def test_a_convolution_of_each_channel_by_itself(code: Callable[..., object], expected: bool) -> None:
    assert depthwise(last(code)) is expected


def test_copies_are_stripped_and_work_is_not() -> None:
    assert op(strip(last(lambda x: F.dropout(x.tanh().double().contiguous().clone(), 0.1, False)))) == "tanh"
    assert op(strip(last(lambda x: x.tanh() * 1.5))) == "mul"
    assert op(strip(last(lambda x: x.tanh().view(10, 8)))) == "view"


def test_partial_is_where_features_may_be_missing() -> None:
    assert partial([last(lambda x: x[..., :4])])
    assert partial([last(lambda x: x * 2), last(lambda x: x.chunk(2, -1)[0])])
    assert not partial([last(lambda x: x * 2), last(lambda x: x.view(10, 8))])
    assert not partial([])
