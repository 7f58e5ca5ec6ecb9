"""Which output features of a projection feed an operand? Ask autograd.

A fused projection (GPT-2's `c_attn`, Phi-3's `gate_up_proj`, the per-head layouts of GPT-NeoX, BLOOM and Falcon)
computes several roles at once, and views, slices and transposes then separate them. Instead of interpreting these
operators, the probe runs the nodes between the projection and the operand on random data, weights the operand's entries
at random, and differentiates the sum with respect to the projection's output. The features with a nonzero gradient are
the rows of the role. No layout is assumed, so none can be assumed wrongly.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import fx

from graphpeft.compat import pytree
from graphpeft.ir.site import Rows
from graphpeft.match.dataflow import Dataflow
from graphpeft.match.products import op

DRAWS = 3
"""Number of draws, whose answers are united: a ReLU hides a feature in one with probability 2^-positions."""


class UnknownRowsError(Exception):
    """The path from a projection to an operand cannot be run on stand-in values, so its rows are unknown."""


def rows(flow: Dataflow, affine: fx.Node, operand: fx.Node) -> Rows | None:
    """Runs of output features of `affine` that `operand` depends on; `None` when it depends on all of them.

    Raises `UnknownRowsError` if sizes on the path depend on the input's values, as in a loop over experts."""
    key = _signature(flow, affine, operand)
    if key not in flow.probed:
        try:
            flow.probed[key] = _probe(flow, affine, operand)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            reason = str(error).partition("\n")[0]
            raise UnknownRowsError(
                f"its rows are unknown, because the nodes in between cannot be run alone: {reason}"
            ) from error
    return flow.probed[key]


def _probe(flow: Dataflow, affine: fx.Node, operand: fx.Node) -> Rows | None:
    shape, axes = concrete(affine.meta["val"].shape), flow.affines[affine].features
    used = torch.zeros(prod(shape[axis] for axis in axes), dtype=torch.bool)
    for draw in range(DRAWS):
        used |= Probe(flow, torch.Generator().manual_seed(draw)).sensitive(affine, operand)
        if used.all():
            return None
    return runs(used)


def _signature(flow: Dataflow, affine: fx.Node, operand: fx.Node) -> tuple[Any, ...]:
    """A key, equal for probes with equal answers, so that the layers of a deep model share one probe.

    Floating-point values from outside the path count by their shape, because the probe draws them at random; all other
    values count by identity.
    """
    places = {node: i for i, node in enumerate([affine, *flow.between(affine, operand)])}

    def seen(value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return repr(value)
        example = value.meta.get("val")
        if value in places or value in flow.program.constants or not isinstance(example, torch.Tensor):
            return places.get(value, value)
        return concrete(example.shape) if example.is_floating_point() else value

    shape = concrete(affine.meta["val"].shape)
    return shape, *((n.target, tuple(map(seen, pytree.tree_leaves((n.args, n.kwargs))))) for n in list(places)[1:])


def runs(mask: torch.Tensor) -> Rows:
    """The half-open runs of True in a one-dimensional mask."""
    edges = torch.diff(
        mask.to(torch.int8), prepend=torch.zeros(1, dtype=torch.int8), append=torch.zeros(1, dtype=torch.int8)
    )
    starts, ends = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
    return tuple(zip(starts, ends, strict=True))


def concrete(shape: Any) -> tuple[int, ...]:
    """Sizes as integers: for a symbolic size the size it was traced with, for one that depends on data 2."""
    return tuple(map(_size, shape))


def _size(size: Any) -> Any:
    if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return size
    return 2 if size.node.hint is None else size.node.hint


class Probe:
    """Runs part of a captured graph on the CPU, with stand-ins for everything that enters it from outside."""

    def __init__(self, flow: Dataflow, generator: torch.Generator):
        self.flow, self.generator = flow, generator
        self.values: dict[fx.Node, Any] = {}

    def sensitive(self, affine: fx.Node, operand: fx.Node) -> torch.Tensor:
        """Mask over the output features of `affine` that `operand` depends on."""
        leaf = torch.randn(concrete(affine.meta["val"].shape), generator=self.generator).requires_grad_()
        with torch.enable_grad():
            self.values[affine] = leaf.clone()  # nodes on the path may write in place, which autograd forbids on a leaf
            for node in self.flow.between(affine, operand):
                self.values[node] = self.run(node)
            out = self.values[operand]
            weights = torch.randn(out.shape, generator=self.generator)
            (grad,) = torch.autograd.grad((out * weights).sum(), leaf)
        features = [axis % grad.dim() for axis in self.flow.affines[affine].features]
        others = [axis for axis in range(grad.dim()) if axis not in features]
        return (grad.abs().sum(others) if others else grad.abs()).flatten() > 0

    def run(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self.value)
        args, kwargs = pytree.tree_map(_on_cpu, (args, kwargs))
        target: Any = node.target
        return getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)

    def value(self, node: fx.Node) -> Any:
        if node not in self.values:
            self.values[node] = self.stand_in(node)
        return self.values[node]

    def stand_in(self, node: fx.Node) -> Any:
        """A value for a node outside the probed path: the real value if the model's input does not determine it."""
        known = self.flow.program.constants.get(node)
        if known is not None and not known.is_meta:
            return known.detach().cpu().float() if known.is_floating_point() else known.detach().cpu()
        example = node.meta.get("val")
        if not isinstance(example, torch.Tensor):
            if isinstance(example, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                return _size(example)
            return self.run(node)
        if example.is_floating_point():
            return torch.randn(concrete(example.shape), generator=self.generator)
        # Recompute indices and masks: a random index would read features that the model does not.
        if node.op == "call_function" and op(node) != "embedding":
            return self.run(node)
        return torch.ones(concrete(example.shape), dtype=example.dtype)


def _on_cpu(value: Any) -> Any:
    """Dtypes and devices for the probe, which runs in float32 on the CPU whatever the model uses."""
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return torch.float32 if isinstance(value, torch.dtype) and value.is_floating_point else value
