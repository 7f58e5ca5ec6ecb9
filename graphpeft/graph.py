"""FX surgery on an owner's graph: stripping a capture's checks, inlining a branch after a projection."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx, nn

from graphpeft.chain import Transform
from graphpeft.match.owners import Lookup
from graphpeft.match.products import added_to, op
from graphpeft.program import Site, layout, oriented
from graphpeft.weight_form import added

CHECKS = frozenset(
    {"_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range_for_size", "_guards_fn"}
)


def strip_checks(graph: fx.Graph) -> fx.Graph:
    """Erase the run-time checks of a capture, in place. They freeze dtype and device, and count as users of values."""
    for node in reversed(list(graph.nodes)):
        if (op(node) in CHECKS or node.target == "_guards_fn") and not node.users:
            graph.erase_node(node)
    return graph


class _Branch(nn.Module):
    """y + branch(x) as one traceable function, with casts only where base and adapter differ in dtype."""

    def __init__(self, branch: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.branch = branch
        kinds = {t.dtype for t in (*branch.parameters(), *branch.buffers()) if t.is_floating_point()}
        self.cast = next(iter(kinds)) if kinds and kinds != {dtype} else None
        self.dtype = dtype

    def forward(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        accumulate: Any = self.branch.accumulate
        if self.cast is None:
            return cast(torch.Tensor, accumulate(y, x))
        return cast(torch.Tensor, accumulate(y.to(self.cast), x.to(self.cast)).to(self.dtype))


class _RelativeBranch(_Branch):
    """The same for a branch relative to the base weight W: it takes W x without the bias that y has, and its gain."""

    def forward(  # type: ignore[override]
        self, y: torch.Tensor, x: torch.Tensor, product: torch.Tensor, gain: torch.Tensor
    ) -> torch.Tensor:
        accumulate: Any = self.branch.accumulate
        values = (y, x, product, gain)
        if self.cast is None:
            return cast(torch.Tensor, accumulate(*values))
        return cast(torch.Tensor, accumulate(*(value.to(self.cast) for value in values)).to(self.dtype))


class _BranchTracer(fx.Tracer):
    """Traces a branch down to its tensors; what differs between `train()` and `eval()` stays a module."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Dropout, Transform))


def insert_branch(
    graph: fx.Graph,
    node: fx.Node,
    source: fx.Node,
    site: Site,
    branch: nn.Module,
    path: str,
    dtype: torch.dtype,
    weight: fx.Node | None = None,
) -> None:
    """Inline `branch` after `node` and hand its result to everything that read `node`.

    `weight` is the node of the base weight, which a branch relative to it looks at.
    """
    readers = list(node.users)
    anchor, values, kind = node, [node, source], _Branch
    if getattr(branch, "relative", False):
        product, gain = _product_and_gain(graph, node, site, branch, path, cast(fx.Node, weight))
        anchor, values, kind = gain, [node, source, product, gain], _RelativeBranch
    inner = _BranchTracer().trace(kind(branch, dtype))
    env: dict[fx.Node, fx.Node] = {}
    inputs = iter(values)
    for inside in inner.nodes:
        if inside.op == "placeholder":
            env[inside] = next(inputs)
        elif inside.op == "output":
            result = env[cast(fx.Node, inside.args[0])]
        else:
            with graph.inserting_after(anchor):
                anchor = env[inside] = graph.node_copy(inside, env.__getitem__)
            if inside.op in {"get_attr", "call_module"}:
                anchor.target = path + str(inside.target).removeprefix("branch")
            _tag(anchor, node, site, branch, path)
    for reader in readers:
        reader.replace_input_with(node, result)


def _product_and_gain(
    graph: fx.Graph, node: fx.Node, site: Site, branch: nn.Module, path: str, weight: fx.Node
) -> tuple[fx.Node, fx.Node]:
    """Nodes after a projection: what the weight alone makes of the input, and the branch's gain of its rows."""
    addend = added_to(node)
    with graph.inserting_after(node):
        product = node if addend is None else graph.call_function(torch.sub, (node, addend))
    module = _module(graph, product, path)
    with graph.inserting_after(module):
        matrix = graph.call_function(oriented, (weight, *layout(site)))
    with graph.inserting_after(matrix):
        gain = graph.call_method("gain", (module, matrix))
    for new in (module, matrix, gain, *((product,) if product is not node else ())):
        _tag(new, node, site, branch, path)
    return product, gain


def insert_before(graph: fx.Graph, node: fx.Node, source: fx.Node, site: Site, transform: nn.Module, path: str) -> None:
    """Let the projection `node` read `source` through a transform."""
    with graph.inserting_before(node):
        new = graph.call_module(path, (source,))
    if "val" in source.meta:
        new.meta["val"] = source.meta["val"]
    _tag(new, node, site, transform, path)
    node.replace_input_with(source, new)


def insert_lookup(graph: fx.Graph, found: Lookup, site: Site, branch: nn.Module, path: str) -> None:
    """Add the rows that a lookup in an embedding table picks from the branch's update."""
    readers = list(found.node.users)
    module = _module(graph, found.node, path)
    with graph.inserting_after(module):
        result = graph.call_method("add_rows", (module, found.node, found.ids, found.padding_idx))
    _tag(module, found.node, site, branch, path)
    _stand_in(result, found.node, readers, site, branch, path)


def insert_sum(graph: fx.Graph, weight: fx.Node, site: Site, branch: nn.Module, path: str) -> None:
    """The weight form inside a graph: whatever reads `weight` reads weight + delta."""
    readers = list(weight.users)
    module = _module(graph, weight, path)
    anchor, base = module, cast(tuple[fx.Node, ...], ())
    if getattr(branch, "relative", False):
        with graph.inserting_after(module):
            anchor = graph.call_function(oriented, (weight, *layout(site)))
        base = (anchor,)
    with graph.inserting_after(anchor):
        delta = graph.call_method("delta", (module, *base))
    with graph.inserting_after(delta):
        result = graph.call_function(added, (weight, delta, site.transposed))
    for new in dict.fromkeys((module, anchor, delta)):
        _tag(new, weight, site, branch, path)
    _stand_in(result, weight, readers, site, branch, path)


def _module(graph: fx.Graph, after: fx.Node, path: str) -> fx.Node:
    """The branch itself, whose method runs as one call: not every factor's matrix can be traced."""
    with graph.inserting_after(after):
        return graph.create_node("get_attr", path)


def _stand_in(result: fx.Node, node: fx.Node, readers: list[fx.Node], site: Site, branch: nn.Module, path: str) -> None:
    if "val" in node.meta:
        result.meta["val"] = node.meta["val"]  # same shape, same dtype
    _tag(result, node, site, branch, path)
    for reader in readers:
        reader.replace_input_with(node, result)


def _tag(new: fx.Node, site_node: fx.Node, site: Site, branch: nn.Module, path: str) -> None:
    """Where an inserted node belongs, so that viewers and the ONNX exporter group it with its module."""
    stack = dict(site_node.meta.get("nn_module_stack", {}))
    full = f"{site.owner}.{path}" if site.owner else path
    stack[full] = (full, f"{type(branch).__module__}.{type(branch).__qualname__}")
    new.meta["nn_module_stack"] = stack
    new.meta["graphpeft"] = path
