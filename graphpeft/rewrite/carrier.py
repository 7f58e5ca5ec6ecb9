"""A weight that carries its branches: what the code of a module reads in place of an adapted weight.

The code of an owner may branch on arguments, on `self.training` or on any attribute, so it runs as it is; only the weight that
it reads is another. An operator that multiplies an activation by the weight gives the base's own product, and each branch is
added beside it. Any other operator gets W + ΔW. A method that needs the side path, such as one with dropout, cannot be
expressed as W + ΔW, so it raises there instead of computing something else.

The carrier is a tensor subclass of no elements: everything that code asks of it goes through `__torch_function__`, so that
nothing is computed before it is known what for. It is made anew at each read, and refers to the parameter that the module holds
at that moment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphpeft.compat.pytree import tree_map
from graphpeft.compat.quantized import dequantize
from graphpeft.compat.tensors import without_elements
from graphpeft.errors import AdapterError
from graphpeft.ir.site import Site
from graphpeft.ir.weights import as_out_in, weight_layout
from graphpeft.rewrite.delta import add_delta, update
from graphpeft.rewrite.rows import Rows

ABOUT = frozenset({
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad", "grad_fn", "is_cuda", "is_cpu", "is_meta",
    "is_sparse", "is_quantized", "names", "output_nr", "size", "dim", "numel", "nelement", "stride", "element_size", "itemsize",
    "nbytes", "is_floating_point", "is_complex", "is_contiguous", "get_device", "storage_offset", "__len__",
})  # fmt: skip
"""What code asks about a weight that is the same for W and for W + ΔW."""
FLIPS = frozenset({"T", "mT", "t"})
PRODUCTS = frozenset({"matmul", "__matmul__", "mm"})
WRITES = frozenset(
    {"__set__", "__setitem__"} | {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "pow", "and", "or")}
)
CASTS = frozenset({"to", "float", "double", "half", "bfloat16", "type_as", "contiguous", "clone"})


@dataclass(frozen=True)
class Carried:
    """One branch at a weight: the adapter's name, the branch's slot and the site."""

    adapter: str
    slot: str
    site: Site
    chain: nn.Module


@dataclass(frozen=True)
class Reading:
    """What one read of an adapted weight stands for."""

    base: Tensor
    holder: nn.Module
    branches: tuple[Carried, ...]
    rows: Rows | None
    training: bool

    def dense(self) -> Tensor:
        """W + ΔW. Raises `AdapterError` for a branch that has no such form."""
        for each in self.branches:
            self._require_dense(each)
        weight = base = dequantize(self.base, self.holder)
        for each in self.branches:
            weight = add_delta(weight, each.site, update(each.chain, base, each.site))
        return weight

    def needs_side_path(self) -> bool:
        """Whether a branch has no form W + ΔW."""
        return any(map(self._only_beside, self.branches))

    def _only_beside(self, each: Carried) -> str:
        """Why a branch cannot be W + ΔW, empty if it can."""
        if self.training and bool(getattr(each.chain, "probability", 0)):
            return "drops features of its input"
        if getattr(each.chain, "before", None) is not None:
            return "transforms its input"
        return "acts on some rows of the batch" if self.rows is not None else ""

    def _require_dense(self, each: Carried) -> None:
        why = self._only_beside(each)
        if why:
            raise AdapterError(
                f"Adapter {each.adapter!r} {why} at {each.site.weight} ({each.site.role}), and here the weight is not read as "
                f"the matrix of a product with an activation, or the model is being compiled. Choose an adapter without that for "
                f"this site, or merge the adapter first."
            )

    def beside(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x times the base weight, given as `(out, in)`, plus the bias, with every branch beside it."""
        inputs = []
        for each in self.branches:
            before = getattr(each.chain, "before", None)
            x = x if before is None else before(x)
            inputs.append(x)
        relative = any(getattr(each.chain, "needs_base_weight", False) for each in self.branches)
        product = F.linear(x, weight) if relative else None
        y = F.linear(x, weight, bias) if product is None else product if bias is None else product + bias
        for each, given in zip(self.branches, inputs, strict=True):
            values = [y, given]
            extra: list[Tensor] = []
            if getattr(each.chain, "needs_base_weight", False):
                matrix = as_out_in(cast(Any, self.base), *weight_layout(each.site))
                values.append(cast(Tensor, product))
                extra.append(cast(Any, each.chain).row_scale(matrix))
            y = self._on_rows(
                each, y, given, values, lambda *v, c=each.chain, e=tuple(extra): _added(c, weight, *v, *e)
            )
        return y

    def lookup(self, ids: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The rows `ids` of the table, with those of every branch added."""
        y: Tensor = F.embedding(ids, weight, *args, **kwargs)
        padding = args[0] if args else kwargs.get("padding_idx")
        for each in self.branches:
            chain: Any = each.chain
            y = self._on_rows(each, y, ids, [y, ids], lambda *v, c=chain: c.add_rows(*v, padding))
        return y

    def _on_rows(
        self, each: Carried, y: Tensor, x: Tensor, values: list[Tensor], compute: Callable[..., Tensor]
    ) -> Tensor:
        if self.rows is None:
            return compute(*values)
        index = self.rows(x, each.adapter, each.slot)
        return y.index_copy(0, index, compute(*(value.index_select(0, index) for value in values)))


def _added(chain: nn.Module, weight: Tensor, y: Tensor, *values: Tensor) -> Tensor:
    """y with the branch added, computed in the branch's dtype where that is another than the weight's, as in rewritten graphs."""
    kind = _kind(chain)
    given = (y, *values) if kind == weight.dtype else tuple(value.to(kind) for value in (y, *values))
    return cast(Any, chain).accumulate(*given).to(y.dtype)


@dataclass(frozen=True)
class Held:
    """What a carrier holds. It is kept apart, since asking a tensor for an attribute goes through `__torch_function__`."""

    reading: Reading
    weight: Tensor
    """The base weight, as far as the code has transposed or cast it."""
    flipped: bool

    @staticmethod
    def of(carrier: Any) -> Held:
        found: Held = carrier.__dict__["held"]
        return found


class CarriedWeight(Tensor):
    """See the module."""

    def __getattr__(self, name: str) -> Any:
        """What code has put on the parameter."""
        return getattr(Held.of(self).reading.base, name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
        if args and isinstance(args[0], cls):
            held, rest = Held.of(args[0]), args[1:]
            if name in ABOUT:
                return func(held.weight, *rest, **kwargs)
            if name in FLIPS or (name in ("transpose", "permute") and _swaps(rest, kwargs)):
                return carrying(held.reading, held.weight.transpose(-1, -2), not held.flipped)
            if name in CASTS and not any(isinstance(a, cls) for a in rest):
                return carrying(held.reading, func(held.weight, *rest, **kwargs), held.flipped)
            if name in WRITES or (name.endswith("_") and not name.endswith("__")):
                _refuse_write(held.reading, name)
        made = _product(cls, func, name, args, kwargs)
        if made is not None:
            return made
        return func(*tree_map(_dense, args), **tree_map(_dense, kwargs))


def carrying(reading: Reading, weight: Tensor, flipped: bool = False) -> CarriedWeight:
    """A carrier of the reading's branches. It has no elements of its own."""
    made = without_elements(CarriedWeight)
    made.__dict__["held"] = Held(reading, weight, flipped)
    return made


def _dense(value: Any) -> Any:
    if not isinstance(value, CarriedWeight):
        return value
    held = Held.of(value)
    dense = held.reading.dense()
    return (dense.transpose(-1, -2) if held.flipped else dense).to(held.weight.dtype)


def _swaps(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a transposition or permutation with these arguments exchanges the two axes of a matrix."""
    given = [*args, *kwargs.values()]
    axes = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    return (
        len(axes) == 2 and {axis % 2 for axis in axes} == {0, 1} and (tuple(axes) not in ((0, 1),) or len(given) == 2)
    )


def _product(cls: type, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The result of an operator that multiplies an activation by the carried weight, `None` for any other operator."""
    if func is F.linear:
        x, weight, bias = _named(("input", "weight", "bias"), args, kwargs)
        return _beside(x, weight, bias, out_in=True)
    if name in PRODUCTS and not kwargs.keys() - {"other", "mat2"}:
        x, weight = [*args, *kwargs.values()]
        return _beside(x, weight, None, out_in=False)
    if name == "__rmatmul__":
        return _beside(args[1], args[0], None, out_in=False)
    if name == "addmm" and not kwargs.keys() - {"mat1", "mat2"}:
        bias, x, weight = [*args, *kwargs.values()]
        return _beside(x, weight, bias, out_in=False)
    if func is F.embedding:
        ids, weight, _, max_norm = _named(("input", "weight", "padding_idx", "max_norm"), args, kwargs)
        if _plain(ids) and isinstance(weight, cls) and not Held.of(weight).flipped and max_norm is None:
            held = Held.of(weight)
            if not any(getattr(each.chain, "needs_base_weight", False) for each in held.reading.branches):
                rest = {k: v for k, v in kwargs.items() if k not in ("input", "weight")}
                return held.reading.lookup(ids, held.weight, *args[2:], **rest)
    return None


def _beside(x: Any, weight: Any, bias: Any, out_in: bool) -> Tensor | None:
    """The product beside which every branch runs, if `weight` is a carrier laid out so and all branches have a side path."""
    if not isinstance(weight, CarriedWeight) or not _plain(x) or isinstance(bias, CarriedWeight):
        return None
    held = Held.of(weight)
    reading = held.reading
    transposed = reading.branches[0].site.transposed
    stored_out_in = transposed == held.flipped
    if stored_out_in != out_in or not all(getattr(e.chain, "has_side_path", True) for e in reading.branches):
        return None
    if any(_narrower(each.chain, held.weight) for each in reading.branches) and not reading.needs_side_path():
        return None  # code that casts the weight up, as for logits in float32, is not rounded to the branch's dtype
    return reading.beside(x, held.weight if out_in else held.weight.transpose(-1, -2), bias)


def _narrower(chain: nn.Module, weight: Tensor) -> bool:
    kind = _kind(chain)
    return weight.is_floating_point() and torch.promote_types(kind, weight.dtype) != kind


def _kind(chain: nn.Module) -> torch.dtype:
    return next(t.dtype for t in (*chain.parameters(), *chain.buffers()) if t.is_floating_point())


def _plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, CarriedWeight)


def _named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    given = dict(zip(names, args, strict=False)) | kwargs
    return [given.get(name) for name in names]


def _refuse_write(reading: Reading, operator: str) -> None:
    site = reading.branches[0].site
    raise AdapterError(
        f"The code of {type(reading.holder).__name__} writes into {site.weight} with `{operator}` while it reads the weight "
        f"adapted: the adapter's update would be lost, or become part of the base. Nothing was changed. Write into the "
        f"parameter inside `with gp.disabled(model)`, or merge the adapter first."
    )
