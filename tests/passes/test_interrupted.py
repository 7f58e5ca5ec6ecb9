"""Ctrl-C inside of a merge: at any line of it the model is left as it was, or merged, and the base is never lost."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import build, call, inputs, outputs, randomize, same
from interrupts import interrupted
from torch import Tensor, nn

import graphpeft as gp
from graphpeft.rewrite.state import get_state, owners

X = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))


class Adapted:
    """A model with a trained adapter, and what it computes without it, with it, and with it merged."""

    def __init__(self, name: str, rules: str) -> None:
        model = build("hand_written" if name == "graph" else name)
        self.call = ((X,), {}) if name == "graph" else call(name, model)
        if name == "graph":
            model = torch.export.export(model, (X,)).module(check_guards=False)
        self.base = self.of(model)
        gp.apply(model, rules, inputs=None if name == "graph" else inputs(name, model))
        randomize(model, std=0.05)
        self.model, self.adapted = model, self.of(model)
        whole = self.copy()
        gp.merge(whole)
        self.merged = self.of(whole)
        assert not same(self.base, self.adapted)

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def of(self, model: nn.Module) -> list[Tensor]:
        return outputs(model, self.call)

    def check(self, model: nn.Module) -> bool:
        """The model is one or the other, to the bit, and gives its base back; whether it is merged."""
        state = get_state(model)
        merged = bool(state.merged)
        assert merged == bool(state.originals) == (not state.attached)
        assert same(self.of(model), self.merged if merged else self.adapted)
        self.undone(model)
        return merged

    def undone(self, model: nn.Module) -> None:
        if get_state(model).merged:
            gp.unmerge(model)
        assert same(self.of(model), self.adapted)
        gp.remove(model)
        assert same(self.of(model), self.base)


CASES = [
    ("llama", "qv:lora(r=2); down:dora(r=2)"),
    ("torch_encoder", "qv+mlp:lora(r=2)"),  # weights that are read as weight + ΔW
    ("gpt2", "embed:lora(r=2); q:vera(r=2)"),  # a tied weight, and rows of a fused one
    ("graph", "qv:lora(r=2)"),
]
cases = pytest.mark.parametrize(("name", "rules"), CASES, ids=[name for name, _ in CASES])


def sweep(name: str, rules: str, lines: Callable[[int], Any]) -> None:
    made = Adapted(name, rules)
    model = made.copy()
    total = interrupted(lambda: gp.merge(model), 0)
    assert total is not None
    assert total > 500
    merged = []
    for at in lines(total):
        model = made.copy()
        assert interrupted(lambda model=model: gp.merge(model), at) is None  # type: ignore[misc]
        merged.append(made.check(model))
    assert not merged[0]


@cases
def test_ctrl_c_at_some_lines(name: str, rules: str) -> None:
    # Few while nothing is written yet, which takes most of the lines.
    sweep(name, rules, lambda total: [*range(1, total - 300, total // 12), *range(total - 300, total, 7), total - 1])


@pytest.mark.slow
@cases
def test_ctrl_c_at_every_line(name: str, rules: str) -> None:
    sweep(name, rules, lambda total: range(1, total))


@pytest.mark.parametrize("name", ["llama", "torch_encoder"])
def test_ctrl_c_while_the_interrupted_merge_is_undone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record then says what is left to do, and the next forward pass or call does it first."""
    made = Adapted(*next(case for case in CASES if case[0] == name))
    writes = len({entry.site.weight for entry in get_state(made.model).adapters["default"].entries})
    write, seen = Tensor.copy_, [0]

    def copy_(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen[0] += 1
        if seen[0] >= first:
            raise KeyboardInterrupt
        return write(self, *args, **kwargs)

    for first in range(1, 2 * writes):
        for act in (made.of, gp.explain, gp.activate):
            model = made.copy()
            seen[0] = 0
            monkeypatch.setattr(Tensor, "copy_", copy_)  # every write from then on
            with contextlib.suppress(KeyboardInterrupt):
                gp.merge(model)
            monkeypatch.undo()
            if seen[0] < first:  # the merge had no so many writes
                continue
            if act is gp.activate:
                gp.activate(model, "default")
            elif act is gp.explain:
                assert "merged" not in str(gp.explain(model))
            else:
                assert same(act(model), made.adapted)  # type: ignore[arg-type]
            made.undone(model)


@pytest.mark.parametrize("name", ["llama", "graph"])
def test_ctrl_c_while_a_merge_is_taken_back(name: str) -> None:
    made = Adapted(*next(case for case in CASES if case[0] == name))

    def merged() -> nn.Module:
        model = made.copy()
        gp.merge(model)
        return model

    model = merged()
    total = interrupted(lambda: gp.unmerge(model), 0)
    assert total is not None
    for at in range(1, total, max(1, total // 60)):
        model = merged()
        assert interrupted(lambda model=model: gp.unmerge(model), at) is None  # type: ignore[misc]
        made.undone(model)


def test_a_failure_while_weights_are_written_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is: no memory, a weight that cannot be written."""
    made = Adapted(*CASES[0])
    model, write = made.copy(), Tensor.copy_
    last = list(owners(model, ("default",)).values())[-1]._parameters["weight"]

    def copy_(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.data_ptr() == last.data_ptr() and not torch.equal(self, args[0]):  # type: ignore[union-attr]
            raise MemoryError
        return write(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "copy_", copy_)
    with pytest.raises(MemoryError):
        gp.merge(model)
    monkeypatch.undo()
    assert not made.check(model)
