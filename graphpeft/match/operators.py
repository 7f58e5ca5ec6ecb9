"""Sets of operators, and predicates on a single node by its operator, operands and shapes alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from graphpeft.compat.operators import is_aten
from graphpeft.match.products import CONVOLUTIONS, PRODUCTS, SAME, op

ATTENTION = frozenset({"scaled_dot_product_attention"})
SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
ADD = frozenset({"add", "add_"})
# Operators after which only part of a projection's output features may be left.
PARTIAL = frozenset(
    {"slice", "select", "split", "split_with_sizes", "chunk", "unbind", "index", "index_select", "narrow", "gather",
     "tensor_split", "getitem", "unsafe_split", "unsafe_chunk"}
)  # fmt: skip
# Point-wise, yet linear in the operand they are called on: not an activation function.
LINEAR_POINTWISE = frozenset(
    {"add", "add_", "sub", "mul", "mul_", "div", "neg", "clone", "where", "masked_fill", "rsub", "fill", "to", "clamp"}
)
RESHAPES = frozenset(
    {"view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "expand", "permute", "transpose", "getitem",
     "_unsafe_view", "reshape_as", "view_as", "expand_as", "mT", "numpy_T", "t", "swapaxes", "movedim"}
)  # fmt: skip
# Operators that mix positions.
MIXING = frozenset(
    {"cumsum", "cumprod", "logcumsumexp", "roll", "pad", "constant_pad_nd", "flip", "associative_scan", "scan", "stack",
     "fft_fft2", "fft_fftn", "fft_rfft"}
)  # fmt: skip
# Operators that return a new tensor and take only size, dtype and device from their operand.
FRESH = frozenset(
    {"new_empty", "new_zeros", "new_ones", "new_full", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like",
     "randn_like", "new_empty_strided"}
)  # fmt: skip
LIKE = frozenset({"type_as", "to", "expand_as", "view_as", "reshape_as"})
NORMS = frozenset({"layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm", "normalize"})
# Reductions that a written-out normalization consists of.
REDUCTIONS = frozenset({"mean", "var", "sum", "amax", "std", "norm", "linalg_vector_norm", "var_mean", "max"})


BARRIERS = PRODUCTS | ATTENTION | SOFTMAX


def pointwise(node: fx.Node) -> bool:
    """Whether the operator works element by element (torch's own tag says so)."""
    tagged = is_aten(node.target) and torch.Tag.pointwise in node.target.tags
    return tagged or op(node) in {"hardswish", "silu", "selu", "softplus", "where"}


def floating(node: fx.Node) -> bool:
    """Whether the node holds numbers to compute with, instead of indices, masks or sizes."""
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        return any(isinstance(v, torch.Tensor) and v.is_floating_point() for v in value)
    return not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex()


def per_position(node: fx.Node) -> bool:
    """Whether a reduction runs over the features of each position, as in a written-out normalization."""
    source = node.args[0]
    value, whole = node.meta.get("val"), source.meta.get("val") if isinstance(source, fx.Node) else None
    value = value[0] if isinstance(value, (list, tuple)) else value
    return isinstance(whole, torch.Tensor) and value is not None and value.shape[:-1] == whole.shape[:-1]


def depthwise(node: fx.Node) -> bool:
    """Whether the node is a depthwise convolution, which projects nothing."""
    if op(node) not in CONVOLUTIONS or not isinstance(node.args[1], fx.Node):
        return False
    weight, groups = node.args[1].meta.get("val"), node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    return weight is not None and groups == weight.shape[0] > 1


def strip(node: fx.Node) -> fx.Node:
    """The node behind casts, copies, dropout and other operators that return the values they were given."""
    while node.args and op(node) in SAME and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def partial(nodes: Iterable[fx.Node]) -> bool:
    return any(op(n) in PARTIAL for n in nodes)


def activation(node: fx.Node) -> bool:
    """Whether the operator is a non-linear point-wise function of one activation."""
    return pointwise(node) and op(node) not in LINEAR_POINTWISE
