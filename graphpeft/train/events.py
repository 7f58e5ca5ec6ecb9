"""Training events: functions `(model, step, total) -> None` that are called between optimizer steps.

`step` counts completed optimizer steps, from 0 to `total`, regardless of the number of micro-batches in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from graphpeft.errors import RuleError

Event = Callable[[nn.Module, int, int], None]
Action = Callable[[nn.Module], object]
"""An event's action on the model, such as `pac.freeze`."""


def at(when: int | float, action: Action) -> Event:
    """Call `action(model)` once: after `when` steps, or, for a float from 0.0 to 1.0, after that fraction of all steps.

    A run that resumes after that point does not repeat it. Raises `RuleError` for any other `when`.
    """
    place = _place(when)
    return lambda model, step, total: _do(action, model, step == place(total))


def since(when: int | float, action: Action) -> Event:
    """Call `action(model)` before every step from `when` on: for state that checkpoints do not keep, as in
    `since(0.8, pac.freeze)`.

    `when` is as for `at`. The action must be idempotent.
    """
    place = _place(when)
    return lambda model, step, total: _do(action, model, step >= place(total))


def every(n: int, action: Action) -> Event:
    """Call `action(model)` after n, 2n, … steps. Raises `RuleError` unless n >= 1."""
    if n < 1:
        raise RuleError(f"every: n = {n} is not >= 1. It counts optimizer steps.")
    return lambda model, step, total: _do(action, model, step > 0 and step % n == 0)


def fire(events: Iterable[Event], model: nn.Module, step: int, total: int) -> None:
    """Call every event, in order. In a custom loop, call this before each step and once after the last."""
    for event in events:
        event(model, step, total)


def _do(action: Action, model: nn.Module, due: bool) -> None:
    if due:
        action(model)


def _place(when: int | float) -> Callable[[int], int]:
    part = isinstance(when, float)
    if when < 0 or (part and when > 1):
        raise RuleError(
            f"Event: when = {when} is neither a step (an int >= 0) nor a fraction of all steps (a float from 0.0 to 1.0)."
        )
    return lambda total: round(when * total) if part else int(when)
