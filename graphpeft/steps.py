"""Steps: which pass is at work, told to whoever watches. While nobody does, a step looks at one variable and no more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, Protocol, TypeVar

PASSES = {
    "apply": "capture to verify, as below",
    "capture": "a model as a graph of ATen operators",
    "normalize": "strip what a capture adds for its own sake",
    "find": "what each weight is for, by dataflow",
    "plan": "rules onto sites",
    "insert": "empty branches onto their owners",
    "initialize": "values for the branches",
    "activate": "rewrite the owners' graphs with the branches",
    "verify": "what the passes promised",
    "remove": "branches off",
    "merge": "branches into the weights",
    "unmerge": "the weights as they were",
    "merge-files": "branches into the weights of a checkpoint on disk",
    "compact": "adapters as small as their gates say",
    "lower": "adapters as plain LoRA",
    "combine": "several adapters as one",
    "rename": "another name for an adapter",
    "swap": "another adapter's numbers into the tensors of one",
    "export": "reference to write, as below, and all checks",
    "reference": "PyTorch's outputs, to compare with",
    "translate": "torch.onnx",
    "census": "slots still alive",
    "share": "one product with A for slots that read the same",
    "rows": "a gate for every row of a batch",
    "gemm": "a slot's sum as one Gemm",
    "tags": "nodes of adapters marked as such",
    "defaults": "slots of rank 0",
    "quantize": "base weights in 4 or 8 bits",
    "write": "a graph to its file",
    "check-slots": "every slot by itself",
    "check-numbers": "ONNX Runtime against PyTorch",
    "check-effect": "whether an adapter moves the output",
    "check-swaps": "adapters one after the other",
    "check-rows": "another adapter for each row",
    "check-quantized": "quantized against float",
}
"""Names that steps of passes have, in the order in which they mostly come. Further steps have names of graphs."""

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


@dataclass(eq=False)
class Step:
    """A pass at work."""

    name: str
    subject: Any = None
    """What the pass is given."""
    outer: Step | None = None
    """The step that this one is part of."""
    result: Any = None
    seconds: float = 0.0
    error: BaseException | None = None
    done: int = 0
    total: int = 0
    """Of what the pass counts, if it does (see `counted`)."""

    @property
    def path(self) -> tuple[str, ...]:
        """Names from the outermost step on."""
        return (*(self.outer.path if self.outer is not None else ()), self.name)

    @property
    def depth(self) -> int:
        return len(self.path) - 1


class Watcher(Protocol):
    """What is told of steps. It must not raise: a pass would stop half-way."""

    def begin(self, step: Step) -> None: ...
    def advance(self, step: Step) -> None: ...
    def end(self, step: Step) -> None: ...


_watchers: ContextVar[tuple[Watcher, ...]] = ContextVar("watchers", default=())
_current: ContextVar[Step | None] = ContextVar("current", default=None)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Tell a watcher of all steps in this context, and of none in other threads."""
    token = _watchers.set((*_watchers.get(), watcher))
    try:
        yield
    finally:
        _watchers.reset(token)


@contextmanager
def step(name: str, subject: Any = None) -> Iterator[Step]:
    """Announce what runs inside; steps nest."""
    watchers = _watchers.get()
    this = Step(name, subject, _current.get())
    if not watchers:
        yield this
        return
    token = _current.set(this)
    for watcher in watchers:
        watcher.begin(this)
    start = time.perf_counter()
    try:
        yield this
    except BaseException as error:
        this.error = error
        raise
    finally:
        this.seconds = time.perf_counter() - start
        _current.reset(token)
        for watcher in watchers:
            watcher.end(this)


def named(name: str | Callable[[Any], str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make every call of a function a step. Its subject is the first argument, of which the name may be a function."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        first = next(iter(signature(function).parameters))

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not _watchers.get():
                return function(*args, **kwargs)
            subject = args[0] if args else kwargs.get(first)
            with step(name if isinstance(name, str) else name(subject), subject) as this:
                result = this.result = function(*args, **kwargs)
            return result

        return call

    return decorate


def counted(items: Sequence[T]) -> Iterable[T]:
    """The items, while watchers of the present step are told how many are done."""
    this = _current.get()
    return items if this is None else _counted(items, this)


def _counted(items: Sequence[T], this: Step) -> Iterator[T]:
    this.done, this.total = 0, len(items)
    for item in items:
        _advance(this)
        yield item
        this.done += 1
    _advance(this)


def _advance(this: Step) -> None:
    for watcher in _watchers.get():
        watcher.advance(this)
