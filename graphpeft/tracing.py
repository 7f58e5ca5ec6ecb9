"""Passes register here where they are defined, and report their steps to watchers.

Without a watcher, a traced call costs one look at a context variable.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from types import CodeType, FrameType
from typing import Any, ParamSpec, Protocol, TypeVar

PASSES: dict[str, str] = {}
"""The passes of all modules imported so far: name and one line of help. `registered` lists those of every module."""

PASS_MODULES: dict[str, str] = {}
"""The module that registered each of them."""

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


@dataclass(eq=False)
class Step:
    """One run of a pass."""

    name: str
    subject: Any = None
    """The object that the pass works on."""
    outer: Step | None = None
    """The enclosing step."""
    result: Any = None
    seconds: float = 0.0
    error: BaseException | None = None
    done: int = 0
    total: int = 0
    """The number of items, if the pass counts them (see `counted`)."""

    @property
    def path(self) -> tuple[str, ...]:
        """Names from the outermost step to this one."""
        return (*(self.outer.path if self.outer is not None else ()), self.name)

    @property
    def depth(self) -> int:
        return len(self.path) - 1


class Watcher(Protocol):
    """Receives the events of steps. It must not raise: the pass would stop half-way."""

    def begin(self, step: Step) -> None: ...
    def advance(self, step: Step) -> None: ...
    def end(self, step: Step) -> None: ...


_watchers: ContextVar[tuple[Watcher, ...]] = ContextVar("watchers", default=())
_current: ContextVar[Step | None] = ContextVar("current", default=None)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Report all steps in this context to a watcher; steps of other threads are not reported."""
    token = _watchers.set((*_watchers.get(), watcher))
    try:
        yield
    finally:
        _watchers.reset(token)


@contextmanager
def step(name: str, subject: Any = None) -> Iterator[Step]:
    """Report the enclosed code as a step; steps nest."""
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


def as_pass(name: str, about: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: register a function as a pass, and trace its calls.

    Args:
        name: what `gp.watch` and `--print-after` call the pass.
        about: what it does, in a few words, for help and completion.

    A pass takes the object it works on as its first argument: a model, a graph, an export. It leaves the object
    unchanged, or changed and valid.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        PASSES[name], PASS_MODULES[name] = about, function.__module__
        return traced(name)(function)

    return register


def traced(name: str | Callable[[Any], str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: trace each call as a step. `name` is the step's name, or computes it from the first argument."""

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


def depth() -> int:
    """How many passes are running in this thread, one inside another.

    Told from the call stack: a counter would stay wrong after an interrupt in the line that counts down.
    """
    frame: FrameType | None = sys._getframe(1)
    found = 0
    while frame is not None:
        found += frame.f_code is _CALL
        frame = frame.f_back
    return found


_CALL: CodeType = traced("")(lambda subject: subject).__code__
"""The code that every traced call runs."""


def counted(items: Sequence[T]) -> Iterable[T]:
    """Iterate over the items and report progress to the watchers of the current step."""
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
