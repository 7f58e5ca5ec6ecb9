"""Random walks over the public operations, with interrupts: after every step the model computes what a dense copy does.

The walk keeps its own account of adapters, strengths and merges. The oracle is a copy of the base with W + ΔW in its weights.
A seed that failed once stays in `FAILED`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import delta, outputs, same
from interrupts import interrupted
from test_code_owners import Block
from torch import nn
from zoo import ZOO, gpt2, llama

import graphpeft as gp
from graphpeft.errors import AdapterError
from graphpeft.ir.weights import get_parameter
from graphpeft.rewrite.delta import add_delta, update
from graphpeft.rewrite.state import chains, find_state, get_state

IDS = torch.randint(3, 90, (3, 6), generator=torch.Generator().manual_seed(0))
X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "llama": (lambda: llama(layers=1), ((), {"input_ids": IDS, "use_cache": False})),
    "gpt2": (lambda: gpt2(n_layer=1), ((), {"input_ids": IDS, "use_cache": False})),
    "bert": (lambda: ZOO["bert"]("sdpa"), ((), {"input_ids": IDS})),
    "code": (Block, ((X,), {})),
}
METHODS = ["lora(r=2)", "lora(r=2, rslora=True)", "rlora", "melora(n=2, r=1)", "olora(r=2)", "pissa(r=2)", "dora(r=2)",
           "vera(r=2)", "blora(r=2)"]  # fmt: skip
FAILED: list[tuple[str, int]] = []


class Walk:
    def __init__(self, kind: str, seed: int, folder: Path) -> None:
        torch.manual_seed(0)
        self.random, self.folder, self.count = random.Random(f"{kind} {seed}"), folder, 0
        make, self.call = MODELS[kind]
        self.model = make().eval()
        self.base = copy.deepcopy(self.model)
        self.inputs = self.call[0] if kind == "code" else None
        self.active: dict[str, float] = {}
        self.names: list[str] = []
        self.merged: tuple[str, ...] = ()
        self.told: list[str] = []

    # -- the account and the oracle

    def account(self) -> tuple[Any, ...]:
        return sorted(self.names), dict(self.active), self.merged

    def recorded(self) -> tuple[Any, ...]:
        state = find_state(self.model)
        return ([], {}, ()) if state is None else (sorted(state.adapters), dict(state.active), state.merged)

    def expected(self) -> list[torch.Tensor]:
        plain = copy.deepcopy(self.base)
        running = {n: self.active.get(n, 1.0) for n in self.merged} if self.merged else self.active
        with torch.no_grad():
            for name in running:
                for site, chain in chains(self.model, name).items():
                    original, weight = get_parameter(self.base, site.weight), get_parameter(plain, site.weight)
                    with chain.settled():
                        weight.copy_(add_delta(weight, site, update(chain, original.detach(), site)))
        return outputs(plain, self.call)

    def check(self) -> None:
        found = outputs(self.model, self.call)
        assert self.recorded() == self.account(), self.told
        expected = self.expected()
        # float32 over one layer, with updates as large as the weights
        assert delta(found, expected) < 2e-4 * max(1.0, max(float(t.abs().max()) for t in expected)), self.told

    # -- operations: each tells what it did by changing the account

    def fresh(self) -> str:
        self.count += 1
        return f"n{self.count}"

    def any(self) -> str:
        return self.random.choice(self.names)

    def apply(self) -> Callable[[], None]:
        name, rules = self.fresh(), self.random.choice(["qv", "q+up", "linear" if self.inputs is None else "qkvo"])
        if self.inputs is not None:
            rules = rules.replace("q+up", "q+o")
        method = self.random.choice(METHODS)
        gp.apply(self.model, f"{rules}:{method}", name=name, seed=self.count, inputs=self.inputs)
        return lambda: (self.names.append(name), self.active.clear(), self.active.update({name: 1.0}))  # type: ignore[func-returns-value]

    def activate(self) -> Callable[[], None]:
        chosen = self.random.sample(self.names, self.random.randint(0, min(2, len(self.names))))
        strengths = {name: self.random.choice([1.0, 0.5, -1.0]) for name in chosen}
        gp.activate(self.model, strengths or None)
        return lambda: (self.active.clear(), self.active.update(strengths))  # type: ignore[func-returns-value]

    def remove(self) -> Callable[[], None]:
        name = self.any()
        gp.remove(self.model, name)
        return lambda: (self.names.remove(name), self.active.pop(name, None), self.__setattr__("merged", ()))  # type: ignore[func-returns-value]

    def rename(self) -> Callable[[], None]:
        old, new = self.any(), self.fresh()
        gp.rename(self.model, old, new)
        renamed = {new if n == old else n: s for n, s in self.active.items()}
        return lambda: (self.names.remove(old), self.names.append(new), self.__setattr__("active", renamed))  # type: ignore[func-returns-value]

    def merge(self) -> Callable[[], None]:
        gp.merge(self.model)
        return lambda: self.__setattr__("merged", tuple(self.active))

    def unmerge(self) -> Callable[[], None]:
        gp.unmerge(self.model)
        return lambda: self.__setattr__("merged", ())

    def save_and_load(self) -> Callable[[], None]:
        old, new = self.any(), self.fresh()
        folder = self.folder / new
        gp.save(self.model, folder, old)
        gp.load(self.model, folder, new)
        return lambda: (self.names.append(new), self.active.clear(), self.active.update({new: 1.0}))  # type: ignore[func-returns-value]

    def swap(self) -> None:
        name = self.any()
        gp.save(self.model, self.folder / "swapped", name)
        gp.swap(self.model, self.folder / "swapped", name)

    def lower(self) -> None:
        gp.lower(self.model, self.any())

    def compact(self) -> None:
        gp.compact(self.model, self.any())

    def combine(self) -> Callable[[], None]:
        new = self.fresh()
        gp.combine(self.model, {self.any(): 0.5, self.any(): -1.5}, new)
        return lambda: (self.names.append(new), self.active.clear(), self.active.update({new: 1.0}))  # type: ignore[func-returns-value]

    def disabled(self) -> None:
        with gp.disabled(self.model):
            found = outputs(self.model, self.call)
        assert same(found, outputs(self.base, self.call))

    def reference(self) -> None:
        with gp.reference(self.model, of=self.any()):
            outputs(self.model, self.call)

    def rows(self) -> None:
        with gp.per_row(self.model, [self.any(), None, self.any()], inputs=self.inputs):
            outputs(self.model, self.call)

    def copy(self) -> None:
        self.model = copy.deepcopy(self.model)

    def pickle(self) -> None:
        stream = io.BytesIO()
        torch.save(self.model, stream)
        stream.seek(0)
        self.model = torch.load(stream, weights_only=False)

    def train(self) -> None:
        if find_state(self.model) is not None and not self.merged and self.active:
            self.model.zero_grad()
            loss = sum(t.square().mean() for t in outputs_with_gradients(self.model, self.call))
            loss.backward()  # type: ignore[union-attr]
            with torch.no_grad():
                for p in self.model.parameters():
                    if p.requires_grad and p.grad is not None:
                        p.sub_(0.05 * p.grad.sign())

    def modes(self) -> None:
        self.model.train().eval()

    def reload(self) -> None:
        self.model.load_state_dict(copy.deepcopy(self.model.state_dict()), assign=self.random.random() < 0.5)

    def look(self) -> None:
        gp.explain(self.model)
        gp.verify(self.model, self.inputs, level="fast")

    def sites(self) -> None:
        gp.sites(self.model, self.inputs)

    # -- steps

    def step(self) -> None:
        acts = [self.apply, self.apply, self.activate, self.activate, self.remove, self.rename, self.merge, self.unmerge,
                self.save_and_load, self.swap, self.lower, self.compact, self.combine, self.disabled, self.reference, self.rows,
                self.copy, self.pickle, self.train, self.train, self.modes, self.reload, self.look, self.sites]  # fmt: skip
        act = self.random.choice(acts) if self.names else self.apply
        told: list[Any] = []
        at = self.random.randrange(1, 1500) if self.random.random() < 0.3 else 0
        self.told.append(f"{act.__name__} at {at}")
        before = self.random.getstate()

        def run() -> None:
            with contextlib.suppress(AdapterError):  # refused, as while merged: nothing is changed then
                told.append(act())

        if interrupted(run, at) is None and not told:
            outputs(self.model, self.call)  # finishes or undoes what is left
            if self.recorded() != self.account():  # it was finished: which it was, is told by doing it again on a copy
                self._account_again(act, before)
        elif told and told[0] is not None:
            told[0]()
        self.check()

    def _account_again(self, act: Any, before: Any) -> None:
        """Do the same on the account alone: what an operation that came to its end would have told."""
        state = get_state(self.model) if find_state(self.model) is not None else None
        self.names = sorted(state.adapters) if state else []
        self.active = dict(state.active) if state else {}
        self.merged = state.merged if state else ()
        assert set(self.active) <= set(self.names)


def outputs_with_gradients(model: nn.Module, call: Any) -> list[torch.Tensor]:
    found = model(*call[0], **call[1])
    values = [found] if isinstance(found, torch.Tensor) else found.values()
    return [t for t in values if isinstance(t, torch.Tensor) and t.requires_grad]


def walk(kind: str, seed: int, steps: int, folder: Path) -> None:
    taken = Walk(kind, seed, folder)
    for _ in range(steps):
        taken.step()
    if find_state(taken.model) is not None:
        gp.remove(taken.model)
    assert same(outputs(taken.model, taken.call), outputs(taken.base, taken.call)), taken.told
    mine, theirs = taken.model.state_dict(), taken.base.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine), "the base, to the bit"
    assert [type(m) for m in taken.model.modules()] == [type(m) for m in taken.base.modules()]
    assert all(p.requires_grad for p in taken.model.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "seed"), [*((kind, seed) for kind in MODELS for seed in range(2)), *FAILED])
def test_short_walks(kind: str, seed: int, tmp_path: Path) -> None:
    walk(kind, seed, 12, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MODELS)
def test_two_thousand_walks(kind: str, tmp_path: Path) -> None:
    for seed in range(500):
        walk(kind, seed, 25, tmp_path)
