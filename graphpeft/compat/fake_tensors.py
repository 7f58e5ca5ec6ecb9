"""Fake tensors, which are private to torch: no other file of graphpeft uses them.

To capture a model without weights, fake CPU tensors replace its parameters on the meta device. A capture on the meta
device itself would lose values that the model's code creates: an index such as `x[..., [-2], :]` is created on the
device of `x`, and a meta tensor holds no values. Next to a fake CPU tensor, the index is a real tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensor, FakeTensorMode

from graphpeft.compat.pytree import tree_map_only


@contextmanager
def with_shapes(model: nn.Module, mode: FakeTensorMode | None = None) -> Iterator[Callable[[Any], Any]]:
    """Replace the model's meta tensors inside the context; yields a function that makes example inputs fit them."""
    stores: list[dict[str, Any]] = [s for m in model.modules() for s in (m._parameters, m._buffers, m.__dict__)]
    held = [(s, n, t) for s in stores for n, t in s.items() if isinstance(t, torch.Tensor) and t.is_meta]
    if not held:
        yield lambda example: example
        return
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return FakeTensor(mode, torch.empty_like(tensor, device="meta"), torch.device("cpu"))

    made: dict[torch.Tensor, torch.Tensor] = {}  # tied tensors stay tied
    for _, _, tensor in held:
        if tensor not in made:
            like = fake(tensor)
            made[tensor] = nn.Parameter(like, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else like
    try:
        for store, name, tensor in held:
            store[name] = made[tensor]
        yield lambda example: tree_map_only(torch.Tensor, fake, example)
    finally:
        for store, name, tensor in held:
            store[name] = tensor


def fill_shapes(graph: fx.Graph, owner: nn.Module) -> None:
    """Give every node inserted into an exported graph a `val`, as `torch.export` did for the other nodes."""
    known = next((v for n in graph.nodes if isinstance(v := n.meta.get("val"), FakeTensor)), None)
    if known is None:
        return
    mode = known.fake_mode
    with with_shapes(owner, mode):  # meta weights cannot be mixed with fake CPU tensors
        for node in graph.nodes:
            if "graphpeft" in node.meta and "val" not in node.meta:
                value = _value(node, owner, mode)
                if isinstance(value, torch.Tensor):
                    node.meta["val"] = value


def _value(node: fx.Node, owner: nn.Module, mode: FakeTensorMode) -> Any:
    """The result of an inserted node: a fake tensor, a dtype, or the branch itself if one of its methods is called."""
    if node.op == "get_attr":
        path, _, leaf = str(node.target).rpartition(".")
        held = getattr(owner.get_submodule(path), leaf)
        return mode.from_tensor(held) if isinstance(held, torch.Tensor) and not is_fake(held) else held
    args, kwargs = fx.map_arg(
        (node.args, node.kwargs), lambda n: n.meta["val"] if "val" in n.meta else _value(n, owner, mode)
    )
    if node.op == "call_module":  # dropout, the only module that a branch calls
        return args[0]
    call: Any = getattr(args[0], str(node.target)) if node.op == "call_method" else node.target
    given = args[1:] if node.op == "call_method" else args
    # A branch's method reads its own, real tensors.
    strict, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True
    try:
        # Composite operators propagate symbolic sizes only when they are decomposed in Python.
        with mode, enable_python_dispatcher(), torch.no_grad():
            return call(*given, **kwargs)
    finally:
        mode.allow_non_fake_inputs = strict


def is_fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def has_value(tensor: torch.Tensor) -> bool:
    """Whether code can read the tensor's values while it is traced: it is real, or a constant that torch knows."""
    return not isinstance(tensor, FakeTensor) or tensor.constant is not None


def storage(tensor: torch.Tensor) -> int:
    """A number that tensors share if and only if they share memory; fake tensors have no address to compare."""
    return tensor.untyped_storage()._cdata
