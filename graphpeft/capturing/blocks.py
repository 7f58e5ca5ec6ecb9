"""Capture deep models in sublinear time: of equal blocks in a row, trace only the first and the last.

While `torch.export` runs the model, one opaque operator replaces each of the other blocks. Its outputs look like those
of the first block. Afterwards `expand_blocks.py` replaces the operator by a copy of the first block's nodes, on the
block's own weights. The result is the graph of a full capture.

A block is left out only if nothing distinguishes it from the first: its structure and attributes, its call, its
outputs, and the memory that these share.

Integers are the exception, because almost every block has one that differs, such as its layer index, and most code
never uses it. While a block is traced, `kinds.trap_ints` puts an object in place of each differing integer. Any use of
the object, even a comparison, is recorded and raises. The capture then starts again and requires that integer to be
equal in all blocks of a kind. An integer that nobody used cannot have influenced the graph.

As a check, the last block is traced too and must give the same nodes as the first. Every other irregularity raises
`FoldingError`, and the model is captured in full.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from graphpeft.capturing.kinds import PLAIN, Watched, module_diff, trap_ints
from graphpeft.compat import pytree
from graphpeft.compat.fake_tensors import has_value, storage
from graphpeft.compat.hooks import has_global_hooks

FEWEST = 3
"""The smallest number of equal blocks that saves work: the first and the last are always traced."""


class FoldingError(Exception):
    """Blocks that look equal may differ: the model must be captured in full."""


class Looks(NamedTuple):
    """Everything that the code around a block can observe of a tensor that the block returns."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Passed(NamedTuple):
    """An output that is one of the block's own inputs, by its position."""

    position: int


@dataclass
class Call:
    """One way in which the blocks of a kind are called, and their outputs for it."""

    key: tuple[Any, ...]
    number: int
    outputs: list[Any] | None = None
    """`Looks`, `Passed` or a plain value for each leaf; `None` if the blocks must be traced at every such call."""
    structure: pytree.TreeSpec | None = None


@dataclass
class Kind:
    """Blocks of one container that differ only in the watched integers."""

    paths: list[str]
    watched: Watched
    calls: list[Call] = field(default_factory=list)


_looks: dict[int, list[Looks]] = {}
"""The fresh outputs of each call, by the call's number, for the duration of a capture."""
_numbers = itertools.count()


@torch.library.custom_op("graphpeft::begin", mutates_args=(), schema="(Tensor[] inputs) -> Tensor")
def begin(inputs: list[torch.Tensor]) -> torch.Tensor:
    """Mark the point where the nodes of a traced block begin."""
    raise NotImplementedError("graphpeft::begin is a temporary marker in a graph and cannot be run")


@torch.library.custom_op(
    "graphpeft::block", mutates_args=(), schema="(Tensor[] inputs, Tensor[] traced, int call, str path) -> Tensor[]"
)
def block(inputs: list[torch.Tensor], traced: list[torch.Tensor], call: int, path: str) -> list[torch.Tensor]:
    """A block that is left out or, with `traced` (its `begin` and outputs), the end of a traced block."""
    raise NotImplementedError("graphpeft::block is a temporary marker in a graph and cannot be run")


@begin.register_fake
def _(inputs: list[torch.Tensor]) -> torch.Tensor:
    return inputs[0].new_empty(())


@block.register_fake
def _(inputs: list[torch.Tensor], traced: list[torch.Tensor], call: int, path: str) -> list[torch.Tensor]:
    return [torch.empty_strided(o.shape, o.stride, dtype=o.dtype, device=o.device) for o in _looks[call]]


def kinds(model: nn.Module, exact: frozenset[str] = frozenset()) -> list[Kind]:
    """Kinds of at least `FEWEST` blocks, in the outermost containers that have any.

    Integer attributes named in `exact` must be equal; others may differ and are watched.
    """
    if has_global_hooks():
        return []
    return list(_kinds(model, "", exact))


def _kinds(module: nn.Module, path: str, exact: frozenset[str]) -> Iterator[Kind]:
    prefix = f"{path}." if path else ""
    inside = {f"{prefix}{name}": child for name, child in module.named_children()}
    if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(inside) >= FEWEST:
        for kind in _grouped(inside, exact):
            if len(kind.paths) >= FEWEST:
                yield kind
                for repeated in kind.paths:
                    del inside[repeated]
    for below, child in inside.items():
        yield from _kinds(child, below, exact)


def _grouped(blocks: Mapping[str, nn.Module], exact: frozenset[str]) -> list[Kind]:
    found: list[Kind] = []
    for path, one in blocks.items():
        for kind in found:
            differ = module_diff(blocks[kind.paths[0]], one, exact)
            if differ is not None:
                kind.paths.append(path)
                kind.watched |= differ
                break
        else:
            if module_diff(one, one, exact) is not None:
                found.append(Kind([path], set()))
    return found


class Folding:
    """Leaves out the calls of equal blocks while the model is traced."""

    def __init__(self, model: nn.Module, repeated: list[Kind]):
        self.model, self.kinds = model, repeated
        self.used: set[str] = set()
        """Watched attributes that the traced code used."""

    @contextmanager
    def folded(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind in self.kinds:
                for path in kind.paths:
                    one = self.model.get_submodule(path)
                    stack.callback(one.__dict__.pop, "forward", None)
                    one.__dict__["forward"] = self._forward(kind, path, one, one.forward)
            try:
                yield
            finally:
                for call in itertools.chain.from_iterable(kind.calls for kind in self.kinds):
                    _looks.pop(call.number, None)

    def _forward(self, kind: Kind, path: str, one: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            leaves, structure = pytree.tree_flatten((args, kwargs))
            described = _describe(leaves)
            if described is None:
                return forward(*args, **kwargs)
            key = (structure, *described)
            call = next((c for c in kind.calls if c.key == key), None)
            if call is None:
                call = Call(key, next(_numbers))
                kind.calls.append(call)
            elif call.outputs is None:
                return forward(*args, **kwargs)
            elif path not in {kind.paths[0], kind.paths[-1]}:
                self._check(kind, one)
                return _returned(call, leaves, _block_op(_tensors(leaves), [], call.number, path))
            return self._trace(kind, call, path, lambda: forward(*args, **kwargs), (args, kwargs))

        return run

    def _check(self, kind: Kind, one: nn.Module) -> None:
        """Raise if the model's code changed the block after the kinds were found."""
        first = self.model.get_submodule(kind.paths[0])
        differ = module_diff(first, one, frozenset(), wrapped=True)
        if differ is None or not differ <= kind.watched:
            raise FoldingError(f"{kind.paths[0]} changed during the capture")

    def _trace(self, kind: Kind, call: Call, path: str, run: Callable[[], Any], given: Any) -> Any:
        """Call the block itself, and enclose its nodes between a `begin` and a `block` operator."""
        before = pytree.tree_leaves(given)
        with trap_ints(self.model.get_submodule(path), kind.watched) as used:
            start = _begin_op(_tensors(before))
            try:
                result = run()
            finally:
                self.used |= used
        after = pytree.tree_leaves(given)
        leaves, structure = pytree.tree_flatten(result)
        outputs = _outputs(leaves, before)
        if outputs is None or len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True)):
            if call.outputs is not None:
                raise FoldingError(f"{path} returns something other than the first of its kind")
            return result
        if call.outputs is None:
            call.outputs, call.structure = outputs, structure
            _looks[call.number] = [o for o in outputs if isinstance(o, Looks)]
        elif call.outputs != outputs or call.structure != structure:
            raise FoldingError(f"{path} returns something other than the first of its kind")
        fresh = [leaf for leaf, o in zip(leaves, outputs, strict=True) if isinstance(o, Looks)]
        return _returned(call, before, _block_op(_tensors(before), [start, *fresh], call.number, path))


_begin_op, _block_op = torch.ops.graphpeft.begin.default, torch.ops.graphpeft.block.default


def _tensors(leaves: list[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _describe(leaves: list[Any]) -> list[Any] | None:
    """A key, equal for calls that a block cannot tell apart; `None` for a call that this module does not understand."""
    found: list[Any] = []
    tensors = _tensors(leaves)
    if not tensors or not any(not has_value(t) for t in tensors):
        return None
    identity: dict[int, int] = {}
    memory: dict[int, int] = {}
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            looks = _look(leaf)
            if looks is None:
                return None
            alias = memory.setdefault(storage(leaf), len(memory)), identity.setdefault(id(leaf), len(identity))
            found.append(
                (looks, leaf.storage_offset(), leaf.requires_grad, alias, _Is(leaf) if has_value(leaf) else None)
            )
        elif type(leaf) in PLAIN:
            found.append((type(leaf), leaf))
        else:
            return None
    return found


@dataclass(frozen=True, eq=False)
class _Is:
    """Equal only to a holder of the very same object, which it keeps alive."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Is) and other.value is self.value


def _look(tensor: torch.Tensor) -> Looks | None:
    sizes = (*tensor.shape, *tensor.stride()) if tensor.layout is torch.strided else (None,)
    if any(type(size) is not int for size in sizes):
        return None
    return Looks(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def _outputs(leaves: list[Any], given: list[Any]) -> list[Any] | None:
    """Descriptions of a block's outputs; `None` if outputs share memory or are neither tensors nor plain values."""
    found: list[Any] = []
    memory = {storage(t) for t in _tensors(given)}
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            position = next((i for i, g in enumerate(given) if g is leaf), None)
            looks = Passed(position) if position is not None else _look(leaf)
            if looks is None or (
                position is None and (storage(leaf) in memory or has_value(leaf) or leaf.requires_grad)
            ):
                return None
            memory.add(storage(leaf))
            found.append(looks)
        elif type(leaf) in PLAIN:
            found.append((type(leaf), leaf))
        else:
            return None
    return found


def _returned(call: Call, given: list[Any], fresh: list[torch.Tensor]) -> Any:
    """The block's result as its caller expects it, built from the tensors that an opaque operator returned."""
    assert call.outputs is not None
    assert call.structure is not None
    made = iter(fresh)
    leaves = [
        next(made) if isinstance(o, Looks) else given[o.position] if isinstance(o, Passed) else o[1]
        for o in call.outputs
    ]
    return pytree.tree_unflatten(leaves, call.structure)
