"""FX surgery on an owner's graph: stripping a capture's checks, inlining a branch after a projection."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, cast

import torch
from torch import fx, nn

from graphpeft.chain import Transform
from graphpeft.errors import AdapterError
from graphpeft.ir.site import Site
from graphpeft.ir.weights import as_out_in, weight_layout
from graphpeft.match.owners import Lookup
from graphpeft.match.products import added_to, op
from graphpeft.rewrite.delta import added

CHECKS = frozenset(
    {"_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range_for_size", "_guards_fn"}
)


def strip_checks(graph: fx.Graph) -> fx.Graph:
    """Erase the run-time checks of a capture, in place. They freeze dtype and device, and count as users of values."""
    for node in reversed(list(graph.nodes)):
        if (op(node) in CHECKS or node.target == "_guards_fn") and not node.users:
            graph.erase_node(node)
    return graph


def with_numbers(graph: fx.Graph, owner: nn.Module) -> fx.Graph:
    """The graph with the branches' multipliers as numbers, as readers want to see them; in place."""
    for node in list(graph.nodes):
        if node.op == "get_attr" and "graphpeft" in node.meta and str(node.target).endswith(".multiplier"):
            number = reduce(getattr, str(node.target).split("."), cast(Any, owner))
            for user in list(node.users):
                values = {read: number if read is node else read for read in user.all_input_nodes}
                user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), values.__getitem__)
            graph.erase_node(node)
    return graph


class _Branch(nn.Module):
    """y + branch(x) as one traceable function, with casts only where base and adapter differ in dtype.

    They are to the dtypes found at run time: FSDP2's mixed precision runs with other parameters than the graph was made for.

    Without a `dtype` the base computes in that of its input, whatever it is.
    """

    def __init__(self, branch: nn.Module, dtype: torch.dtype | None):
        super().__init__()
        self.branch = branch
        tensors = {
            n: t.dtype for n, t in (*branch.named_parameters(), *branch.named_buffers()) if t.is_floating_point()
        }
        self.like = next((n for n in tensors if set(tensors.values()) != {dtype}), None)
        """Path of a tensor that has the dtype to cast to."""
        self.narrow = dtype is not None and torch.promote_types(dtype, torch.float32) != dtype

    def sum(self, times: float, *values: torch.Tensor) -> torch.Tensor:
        accumulate: Any = self.branch.accumulate
        if hasattr(self.branch, "multiplier"):
            accumulate = partial(accumulate, times=times)
        if self.like is None:
            return cast(torch.Tensor, accumulate(*values))
        kind = reduce(getattr, self.like.split("."), cast(Any, self.branch)).dtype
        return cast(torch.Tensor, accumulate(*(value.to(kind) for value in values)).to(values[0].dtype))

    def forward(self, times: float, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.sum(times, y, x)


class _RelativeBranch(_Branch):
    """The same for a branch relative to the base weight W: it takes W x without the bias that y has, and its gain."""

    def forward(  # type: ignore[override]
        self, times: float, y: torch.Tensor, x: torch.Tensor, product: torch.Tensor, gain: torch.Tensor
    ) -> torch.Tensor:
        made = self.sum(times, y, x, product, gain)
        return made.to(y.dtype) if self.narrow and self.like is None else made  # a gain is float32 or better


class _BranchTracer(fx.Tracer):
    """Traces a branch down to its tensors; what differs between `train()` and `eval()` stays a module."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Dropout, Transform))

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A factor's own code: hooks around it, such as accelerate's, look at values, which there are none of here."""
        if self.is_leaf_module(m, ""):
            return super().call_module(m, forward, args, kwargs)
        return type(m).forward(m, *args, **kwargs)


@dataclass(frozen=True)
class Splice:
    """One branch on its way into a graph.

    Several branches at one node make a chain of sums, each on top of the last, while what they read (the input, the base's
    own product, the base weight) stays what it is without any.
    """

    graph: fx.Graph
    sums: dict[fx.Node, fx.Node]
    """The last sum at every node that has one."""
    site: Site
    branch: nn.Module
    path: str
    """Where the graph's owner keeps the branch."""
    rows: bool = False
    """Whether the branch acts on those rows alone that the owner's `Rows` names."""

    def before(self, node: fx.Node, source: fx.Node, transform: nn.Module) -> None:
        """Let the projection `node` read `source` through a transform, the branch's own `before`."""
        with self.graph.inserting_before(node):
            new = self.graph.call_module(f"{self.path}.before", (source,))
        if "val" in source.meta:
            new.meta["val"] = source.meta["val"]
        self._tag(new, node, transform, f"{self.path}.before")
        node.replace_input_with(source, new)

    def beside(self, node: fx.Node, source: fx.Node, dtype: torch.dtype | None, weight: fx.Node | None) -> None:
        """Inline the branch, which reads `source`, after the projection `node`.

        `dtype` is the base weight's, unless it is packed, and `weight` its node, which a branch relative to it looks at.
        """
        last, readers = self._last(node)
        anchor, values, kind = last, [last, source], _Branch
        if self._relative:
            product, gain = self._product_and_gain(node, last, cast(fx.Node, weight))
            anchor, values, kind = gain, [last, source, product, gain], _RelativeBranch
        index = None
        if self.rows:  # a gain, the fourth, is one for all rows
            anchor, index, values[:3] = self._pick(node, anchor, source, values[:3])
        anchor, times = self._multiplier(node, anchor)
        inner = _BranchTracer().trace(kind(self.branch, dtype))
        env: dict[fx.Node, Any] = dict(
            zip((n for n in inner.nodes if n.op == "placeholder"), (times, *values), strict=True)
        )
        for inside in inner.nodes:
            if inside.op == "output":
                self._close(node, readers, self._put_back(node, last, index, env[cast(fx.Node, inside.args[0])]))
            elif inside.op != "placeholder":
                with self.graph.inserting_after(anchor):
                    anchor = env[inside] = self.graph.node_copy(inside, env.__getitem__)
                if inside.op in {"get_attr", "call_module"}:
                    anchor.target = self.path + str(inside.target).removeprefix("branch")
                self._tag(anchor, node)

    def lookup(self, found: Lookup) -> None:
        """Add the rows that a lookup in an embedding table picks from the branch's update."""
        last, readers = self._last(found.node)
        anchor = module = self._module(found.node, last)
        index, values = None, [last, found.ids]
        if self.rows:
            anchor, index, values = self._pick(found.node, module, found.ids, values)
        with self.graph.inserting_after(anchor):
            result = self.graph.call_method("add_rows", (module, *values, found.padding_idx))
        self._tag(result, found.node)
        self._close(found.node, readers, self._put_back(found.node, last, index, result), found.node)

    def onto(self, weight: fx.Node) -> None:
        """The weight form inside a graph: whatever reads `weight` reads weight + delta."""
        if self.rows:
            raise AdapterError(
                f"{self.site.weight} ({self.site.role}) is read as weight + ΔW, which is one for the whole batch. Run the rows "
                f"of each adapter apart, or leave that site out of its rules."
            )
        last, readers = self._last(weight)
        anchor = module = self._module(weight, last)
        base: tuple[fx.Node, ...] = ()
        if self._relative:
            with self.graph.inserting_after(module):
                anchor = self.graph.call_function(as_out_in, (weight, *weight_layout(self.site)))
            self._tag(anchor, weight)
            base = (anchor,)
        with self.graph.inserting_after(anchor):
            delta = self.graph.call_method("delta", (module, *base))
        with self.graph.inserting_after(delta):
            result = self.graph.call_function(added, (last, delta, self.site.transposed))
        for new in (delta, result):
            self._tag(new, weight)
        self._close(weight, readers, result, weight)

    def _pick(
        self, node: fx.Node, anchor: fx.Node, source: fx.Node, values: list[fx.Node]
    ) -> tuple[fx.Node, fx.Node, list[fx.Node]]:
        """The last node that is new, the indices of the branch's own rows, and those rows of the values."""
        home, adapter, key = self.path.split(".")
        with self.graph.inserting_after(anchor):
            anchor = index = self.graph.call_module(f"{home}.by_row", (source, adapter, key))
        self._tag(index, node)
        picked = []
        for value in values:
            with self.graph.inserting_after(anchor):
                anchor = self.graph.call_function(torch.index_select, (value, 0, index))
            self._tag(anchor, node)
            picked.append(anchor)
        return anchor, index, picked

    def _put_back(self, node: fx.Node, last: fx.Node, index: fx.Node | None, result: fx.Node) -> fx.Node:
        """All rows, of which those that the branch acts on are its result. In place: nothing else reads the rows as they were,
        and a copy for every adapter would take longer than the adapters do."""
        if index is None:
            return result
        with self.graph.inserting_after(result):
            whole = self.graph.call_method("index_copy_", (last, 0, index, result))
        self._tag(whole, node)
        return whole

    @property
    def _relative(self) -> bool:
        return bool(getattr(self.branch, "needs_base_weight", False))

    def _last(self, node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        """The last sum at a node, which is the node itself where there is none, and what reads it."""
        last = self.sums.get(node, node)
        return last, list(last.users)

    def _close(self, node: fx.Node, readers: list[fx.Node], result: fx.Node, alike: fx.Node | None = None) -> None:
        """Hand a sum to what read the last one; `alike` is of the same shape and dtype."""
        if alike is not None and "val" in alike.meta:
            result.meta["val"] = alike.meta["val"]
        for reader in readers:
            reader.replace_input_with(self.sums.get(node, node), result)
        self.sums[node] = result

    def _product_and_gain(self, node: fx.Node, last: fx.Node, weight: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Nodes for what the weight alone makes of the input, and for the branch's gain of its rows."""
        addend = added_to(node)
        product = node
        if addend is not None:
            with self.graph.inserting_after(last):
                product = self.graph.call_function(torch.sub, (node, addend))
            self._tag(product, node)
        module = self._module(node, last if addend is None else product)
        with self.graph.inserting_after(module):
            matrix = self.graph.call_function(as_out_in, (weight, *weight_layout(self.site)))
        with self.graph.inserting_after(matrix):
            gain = self.graph.call_method("row_scale", (module, matrix))
        for new in (matrix, gain):
            self._tag(new, node)
        return product, gain

    def _module(self, node: fx.Node, after: fx.Node) -> fx.Node:
        """The branch itself, whose method runs as one call: not every factor's matrix can be traced."""
        with self.graph.inserting_after(after):
            module = self.graph.create_node("get_attr", self.path)
        self._tag(module, node)
        return module

    def _multiplier(self, node: fx.Node, anchor: fx.Node) -> tuple[fx.Node, fx.Node | float]:
        """The last node that is new, and the branch's multiplier, which is read when the code runs."""
        if not hasattr(self.branch, "multiplier"):
            return anchor, 1.0
        with self.graph.inserting_after(anchor):
            times = self.graph.create_node("get_attr", f"{self.path}.multiplier")
        self._tag(times, node)
        return times, times

    def _tag(self, new: fx.Node, node: fx.Node, module: nn.Module | None = None, path: str | None = None) -> None:
        """Where an inserted node belongs, so that viewers and the ONNX exporter group it with its module."""
        kind, path = type(module or self.branch), path or self.path
        stack = dict(node.meta.get("nn_module_stack", {}))
        full = f"{self.site.owner}.{path}" if self.site.owner else path
        stack[full] = (full, f"{kind.__module__}.{kind.__qualname__}")
        new.meta["nn_module_stack"] = stack
        new.meta["graphpeft"] = path
