"""What happens while a model trains: an event is a function `(model, step, total) -> None`, called between steps.

`step` counts the optimizer steps that are done, 0 … `total`, however many micro-batches each of them took.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from graphpeft.errors import RuleError

Event = Callable[[nn.Module, int, int], None]
Action = Callable[[nn.Module], object]
"""What an event does to the model, such as `pac.freeze`."""


def at(when: int | float, action: Action) -> Event:
    """`action(model)` once, after `when` steps, or as a float from 0.0 to 1.0 after that part of all steps.

    A run that is resumed later than that does not repeat it. Raises `RuleError` for any other `when`.
    """
    place = _place(when)
    return lambda model, step, total: _do(action, model, step == place(total))


def since(when: int | float, action: Action) -> Event:
    """`action(model)` before every step from there on: for what a checkpoint does not keep, as in `since(0.8, pac.freeze)`.

    `when` is that of `at`. The action must not mind being repeated.
    """
    place = _place(when)
    return lambda model, step, total: _do(action, model, step >= place(total))


def every(n: int, action: Action) -> Event:
    """`action(model)` after n, 2n, … steps. Raises `RuleError` unless n >= 1."""
    if n < 1:
        raise RuleError(f"every: n = {n} is not >= 1. It counts optimizer steps.")
    return lambda model, step, total: _do(action, model, step > 0 and step % n == 0)


def fire(events: Iterable[Event], model: nn.Module, step: int, total: int) -> None:
    """Let every event act, in order; for one's own loop, before each step and once after the last."""
    for event in events:
        event(model, step, total)


def _do(action: Action, model: nn.Module, due: bool) -> None:
    if due:
        action(model)


def _place(when: int | float) -> Callable[[int], int]:
    part = isinstance(when, float)
    if when < 0 or (part and when > 1):
        raise RuleError(
            f"Event: when = {when} is neither a step, an int >= 0, nor a part of all steps, a float from 0.0 to 1.0."
        )
    return lambda total: round(when * total) if part else int(when)
