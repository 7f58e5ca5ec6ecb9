"""Which steps events act at, in one's own loop; in a Trainer see test_trainer.py."""

from __future__ import annotations

import pytest
from torch import nn

from graphpeft.errors import RuleError
from graphpeft.train import at, every, fire, since


def test_when_events_act() -> None:
    model, step = nn.Identity(), 0
    seen: dict[str, list[int]] = {}

    def note(name: str):
        return lambda found: seen.setdefault(name, []).append(step if found is model else -1)

    events = [
        at(0, note("0")),
        at(3, note("3")),
        at(0.57, note("0.57")),
        at(1.0, note("1.0")),
        at(1, note("1")),
        at(11, note("never")),
        since(0.8, note("since")),
        every(4, note("every")),
    ]
    for step in range(11):
        fire(events, model, step, 10)
    assert seen == {
        "0": [0], "3": [3], "0.57": [6], "1.0": [10], "1": [1], "since": [8, 9, 10], "every": [4, 8],
    }  # fmt: skip


def test_fractions_do_not_round_down() -> None:
    hit = []
    fire([at(0.57, hit.append)], nn.Identity(), 57, 100)  # 0.57 · 100 is 56.99… in floating point
    assert len(hit) == 1


def test_refusals() -> None:
    for when in (-1, 1.5, -0.1):
        with pytest.raises(RuleError, match=f"when = {when} is neither a step"):
            at(when, print)
    with pytest.raises(RuleError, match="n = 0 is not >= 1"):
        every(0, print)
