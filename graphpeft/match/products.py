"""Reading projections: which nodes multiply an activation by a parameter, and how the parameter is laid out.

`linear`, `addmm`, `mm`, `matmul`, `bmm`, `einsum`, convolutions and the grouped products of expert layers all compute
output features = weight · input features. Nothing here looks at names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from graphpeft.compat.operators import is_aten, plain_name

GROUPED = frozenset({"_grouped_mm", "grouped_mm", "grouped_mm_fallback"})
CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
MATMULS = frozenset({"mm", "matmul", "bmm"})
PRODUCTS = frozenset({"linear", "addmm", "baddbmm", "einsum", "convolution"}) | MATMULS | CONVOLUTIONS | GROUPED
# Operators that only rename, move or keep their first operand's values: their result *is* that operand.
SAME = frozenset(
    {"to", "_to_copy", "type_as", "alias", "detach", "detach_", "contiguous", "clone", "dropout", "lift_fresh_copy"}
)
TRANSPOSES = frozenset({"t", "transpose", "permute", "numpy_T", "mT", "T"})
PICKS = frozenset({"select", "index", "index_select", "getitem", "unsqueeze"})
"""Operators that take one expert's matrix out of a stack."""


def op(node: fx.Node) -> str:
    """The operator's plain name, the same for `aten.linear.default`, `F.linear` and a method call."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return node.op
    if is_aten(node.target):
        return plain_name(node.target)
    return getattr(node.target, "__name__", str(node.target))


@dataclass(frozen=True)
class Affine:
    """A projection: `node` multiplies `input` by the parameter at `weight`."""

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    transposed: bool = False
    """The weight is stored (in, out) rather than (out, in)."""
    features: tuple[int, ...] = (-1,)
    """Axes of the result that hold the output features."""
    outs: int = 1
    """How many axes of the weight hold the output features; a convolution or an einsum may spread them."""
    kind: Literal["linear", "conv", "experts"] = "linear"
    first: int | None = None
    """The first row of the weight that is used, if only some are (the packed weight of `nn.MultiheadAttention`)."""
    plain: bool = True
    """Whether input and output features are last axes, so that a side path is equivalent to a change of the weight."""

    @property
    def pointwise(self) -> bool:
        """Whether each position is projected by itself: no convolution wider than one."""
        return self.kind != "conv" or all(int(k) == 1 for k in self.weight.meta["val"].shape[2:])


def behind_transposes(node: fx.Node, picks: bool = False) -> tuple[fx.Node, int]:
    """The node behind transposes, casts, copies (and picks from a stack), and the number of transposes."""
    flips = 0
    through = TRANSPOSES | SAME | (PICKS if picks else frozenset())
    while node.args and isinstance(node.args[0], fx.Node):
        name = str(node.args[1]) if op(node) == "getattr" else op(node)
        if name not in through:
            break
        flips += name in TRANSPOSES
        node = node.args[0]
    return node, flips


def read_affine(node: fx.Node, is_weight: Callable[[fx.Node], bool]) -> Affine | None:
    """`node` as a product of an activation and a parameter, or `None`."""
    name = op(node)
    if name in CONVOLUTIONS:
        x, w = _given(node, 0, "input"), _given(node, 1, "weight")
        good = isinstance(x, fx.Node) and isinstance(w, fx.Node)
        return _convolution(node, x, w, is_weight) if good else None
    if name == "einsum":
        return _einsum(node, is_weight)
    for x, w, left in _factors(name, node):
        found = _product(node, x, w, left, is_weight)
        if found is not None:
            return found
    return None


def added_to(node: fx.Node) -> fx.Node | None:
    """The tensor to which a projection adds its product: the bias of `linear`, the first operand of `addmm`."""
    name = op(node)
    if name == "linear":
        found = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    else:
        found = node.args[0] if name in {"addmm", "baddbmm"} and len(node.args) >= 3 else None
    return found if isinstance(found, fx.Node) else None


def _given(node: fx.Node, place: int, keyword: str) -> Any:
    """An argument, by its place or its keyword."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(keyword)


def _factors(name: str, node: fx.Node) -> list[tuple[Any, Any, bool | None]]:
    """Triples to try: activation, weight, whether the weight is on the left (`None` for `linear`)."""
    args = list(node.args)
    if name == "linear":
        return [(_given(node, 0, "input"), _given(node, 1, "weight"), None)]
    if name in {"addmm", "baddbmm"} and len(args) >= 3:
        args = args[1:]
    elif name not in MATMULS | GROUPED or len(args) < 2:
        return []
    return [(args[0], args[1], False), (args[1], args[0], True)]


def _product(node: fx.Node, x: Any, w: Any, left: bool | None, is_weight: Callable[[fx.Node], bool]) -> Affine | None:
    if not (isinstance(x, fx.Node) and isinstance(w, fx.Node)):
        return None
    root, flips = behind_transposes(w)
    scaled = op(root) in {"mul", "div"} and not isinstance(root.args[1], fx.Node) and isinstance(root.args[0], fx.Node)
    if scaled:
        root, more = behind_transposes(root.args[0])  # type: ignore[arg-type]
        flips += more
    kind: Literal["linear", "experts"] = "linear"
    first = None
    if left is None and not is_weight(root) and not flips:
        root, first = _some_rows(root)
    if not is_weight(root) or _dim(root) == 3:
        root, flips = behind_transposes(w, picks=True)
        kind = "experts"
    if not is_weight(root) or root is x or _dim(root) != (3 if kind == "experts" else 2):
        return None
    stored_in_out = left is False
    # If the code scales the weight or the product, an unscaled side path would not be equivalent.
    factors = [node.kwargs.get(name, 1) for name in ("alpha", "beta")]
    plain = kind == "linear" and not left and first is None and not scaled and factors == [1, 1]
    transposed = stored_in_out ^ (flips % 2 == 1)
    return Affine(node, x, root, transposed, (-2,) if left else (-1,), kind=kind, first=first, plain=plain)


def _some_rows(node: fx.Node) -> tuple[fx.Node, int | None]:
    """If `node` slices rows of another node, that node and the first row; otherwise `node` and `None`."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return node, None
    if op(node) == "slice":
        given: list[Any] = [*node.args[1:], *(0, 0, None, 1)[len(node.args) - 1 :]]
        axis, start, _, step = given
        size = source.meta["val"].shape[0] if "val" in source.meta else 0
        start = start or 0
        if axis == 0 and step == 1 and isinstance(start, int) and start >= -size:
            return behind_transposes(source)[0], start + size if start < 0 else start
    if op(node) == "getitem" and op(source) in {"split", "split_with_sizes", "chunk", "tensor_split"}:
        parts, axis = source.meta.get("val"), source.args[2] if len(source.args) > 2 else source.kwargs.get("dim", 0)
        if parts is not None and axis == 0:
            return behind_transposes(source.args[0])[0], sum(p.shape[0] for p in parts[: node.args[1]])  # type: ignore
    return node, None


def _dim(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else 2


def _convolution(node: fx.Node, x: fx.Node, w: fx.Node, is_weight: Callable[[fx.Node], bool]) -> Affine | None:
    root, flips = behind_transposes(w)
    if flips or not is_weight(root):
        return None
    channels = -1 - int(op(node)[4])  # conv2d: (..., channels, height, width)
    return Affine(node, x, root, features=(channels,), kind="conv", plain=False)


def _einsum(node: fx.Node, is_weight: Callable[[fx.Node], bool]) -> Affine | None:
    """An einsum with one parameter whose axes are all inputs, then all outputs, or the other way round."""
    if len(node.args) < 2 or not isinstance(node.args[0], str):
        return None
    given = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
    factors = [f for f in given if isinstance(f, fx.Node)]
    terms, _, out = node.args[0].replace(" ", "").replace("...", ".").partition("->")
    behind = [behind_transposes(f) for f in factors]
    weights = [i for i, (root, flips) in enumerate(behind) if is_weight(root) and not flips]
    if len(factors) != 2 or len(weights) != 1 or terms.count(",") != 1:
        return None
    (one,), labels = weights, terms.split(",")
    w, x = labels[one], labels[1 - one]
    stack = w[0] in x and w[0] in out
    rest = w[1:] if stack else w
    made = [label for label in rest if label in out and label not in x]
    read = [label for label in rest if label in x and label not in out]
    if not made or not read or rest not in ("".join(made + read), "".join(read + made)):
        return None
    return Affine(
        node,
        factors[1 - one],
        behind[one][0],
        transposed=rest[0] in read,
        features=tuple(out.index(label) - len(out) for label in made),
        outs=len(made),
        kind="experts" if stack else "linear",
        plain=not stack and len(made) == len(read) == 1 and out.endswith(made[0]) and x.endswith(read[0]),
    )
