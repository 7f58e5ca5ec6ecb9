"""Verify: check what the passes promised, cheap checks first, and report every check."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from graphpeft.ambient import as_called, plain
from graphpeft.capturing.capture import Inputs, example_call, inference_view
from graphpeft.capturing.outputs import difference, floats
from graphpeft.chain import Chain, Transform
from graphpeft.compat.quantized import library
from graphpeft.errors import VerifyError
from graphpeft.ir.site import Site
from graphpeft.ir.weights import float_weight, get_parameter
from graphpeft.passes.merge import merge, unmerge
from graphpeft.rewrite.adapters import home, places
from graphpeft.rewrite.delta import update
from graphpeft.rewrite.entry import on_model
from graphpeft.rewrite.owner import Adapted, install
from graphpeft.rewrite.state import chains, get_state, owners, refuse_merged
from graphpeft.rewrite.sync import inactive
from graphpeft.tracing import as_pass

Level = Literal["off", "fast", "full"]


@dataclass
class Report:
    """Checks and their outcomes, in the order in which they ran. Prints as one line each."""

    checks: list[tuple[str, bool, str]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(passed for _, passed, _ in self.checks)

    def add(self, name: str, passed: bool, detail: str) -> None:
        self.checks.append((name, passed, detail))

    def __str__(self) -> str:
        return "\n".join(f"{'ok  ' if passed else 'FAIL'} {name}: {detail}" for name, passed, detail in self.checks)


@as_pass("verify", "check what the passes promised")
@plain()
@on_model(intact=False)
def verify(model: nn.Module, inputs: Inputs = None, level: Level = "full", identity: bool = False) -> Report:
    """Check an adapted model; raises `VerifyError` with the whole report if a check fails.

    `fast` checks names, trainable parameters and rewritten graphs, without running the model. `full` also runs it on
    `inputs` (by default made from the config) and checks that disabling gives the base, gradients reach exactly the
    planned parameters, the merged model agrees with the adapted one, and un-merging restores every weight bit for bit.
    `identity` also requires that the adapters leave the output unchanged bit for bit, as at initialization.
    """
    report = Report()
    if level == "off":
        return report
    refuse_merged(model, "verify")
    _accounting(model, report)
    _graphs(model, report)
    if level == "full" and not any(p.is_meta for p in model.parameters()):
        call = example_call(model, inputs)
        _outputs(model, call, report, identity)
        _gradients(model, call, report)
    if not report.ok:
        raise VerifyError(f"{type(model).__name__} failed verification:\n{report}")
    return report


def _accounting(model: nn.Module, report: Report) -> None:
    state = get_state(model)
    names = dict(model.named_parameters(remove_duplicate=False))
    lost = [n for n in state.base_requires_grad if n not in names]
    count = len({id(names[n]) for n in state.base_requires_grad if n in names})
    report.add(
        "base names",
        not lost,
        f"{count} parameters keep their names" if not lost else f"lost: {lost[:3]}",
    )
    planned = {id(p) for a in state.active for c in chains(model, a).values() for p in c.parameters()}
    trained = {id(p): n for n, p in names.items() if p.requires_grad and n not in state.base_requires_grad}
    missing, extra = planned - trained.keys(), [n for i, n in trained.items() if i not in planned]
    report.add(
        "trainable",
        not (missing or extra),
        f"{len(planned)} tensors, as planned"
        if not (missing or extra)
        else f"unplanned: {extra[:3]}, missing: {len(missing)}",
    )


def _graphs(model: nn.Module, report: Report) -> None:
    """Check that every active branch is in its owner's graph, or that its owner exposes the adapted weight."""
    state = get_state(model)
    absent = []
    for path, owner in owners(model, tuple(state.active)).items():
        adapters = home(owner)
        graph = getattr(owner, "graph", None)
        tags = {n.meta.get("graphpeft") for n in graph.nodes} if graph is not None else set()
        for site, chain, branch in adapters.running() if adapters else []:
            # One branch serves two places of a tied weight in one owner.
            names = {b for _, c, b in adapters.running() if c is chain} if adapters else {branch}
            if not names & (tags | (owner.reads if isinstance(owner, Adapted) else frozenset())):
                absent.append(f"{path}:{site.role}")
    count = sum(len(state.adapters[a].entries) for a in state.active)
    report.add("graphs", not absent, f"{count} sites rewritten" if not absent else f"no branch at {absent[:3]}")


def _outputs(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], report: Report, identity: bool) -> None:
    args, kwargs = call
    state = get_state(model)
    with inference_view(model), as_called():
        adapted = floats(model(*args, **kwargs))
        with inactive(model):
            base = floats(model(*args, **kwargs))
        moved = difference(adapted, base)
        if identity:
            report.add("identity", moved == 0, f"adapters move the output by {moved:.1e}, expected 0 at initialization")
        else:
            acts = any(
                update(c, float_weight(model, s.weight), s).any()
                for a in state.active
                for s, c in chains(model, a).items()
            )
            report.add("effect", moved > 0 or not acts, f"adapters move the output by up to {moved:.1e}")
        rounded = any(chain.before is not None for a in state.active for chain in chains(model, a).values())
        if rounded:
            report.add("merge", True, "not tried: an adapter that rounds its input does not merge")
        elif any(library(get_parameter(model, s.weight)) for a in state.active for s in chains(model, a)):
            report.add("merge", True, "not tried: quantized weights would be rounded anew")
        elif state.active:
            before = {
                e.site.weight: get_parameter(model, e.site.weight).detach().clone()
                for a in state.active
                for e in state.adapters[a].entries
            }
            merge(model)
            try:
                merged = floats(model(*args, **kwargs))
            finally:
                unmerge(model)
            error, scale = difference(merged, adapted), max(float(t.abs().max()) for t in adapted)
            # Each weight's sum is rounded once, and depth amplifies that. Half precision allows far less amplification.
            bound = max(min(1e3 * torch.finfo(t.dtype).eps, 16 * 2**-7) for t in adapted) * max(scale, 1.0)
            report.add("merge", error <= bound, f"merged differs from adapted by {error:.1e} (bound {bound:.1e})")
            exact = all(torch.equal(get_parameter(model, n), w) for n, w in before.items())
            report.add("unmerge", exact, f"{len(before)} weights restored to the bit" if exact else "weights changed")


def _gradients(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], report: Report) -> None:
    """Check that one backward pass reaches every tensor that should train, at each place of a tied weight."""
    state = get_state(model)
    wanted = [p for a in state.active for c in chains(model, a).values() for p in _reachable(c)]
    if not wanted:
        return
    unreached = _unreached(model, call, wanted)
    report.add("gradients", not unreached, f"reach {len(wanted) - unreached} of {len(wanted)} trained tensors")
    tied = [(s, c) for a in state.active for s, c in chains(model, a).items() if s.tied]
    ignored = []
    for site, chain in tied:
        for place in places(site):
            with _alone(model, site, place):
                if _unreached(model, call, _reachable(chain)):
                    ignored.append(place.weight)
    if tied:
        count = sum(len(places(site)) for site, _ in tied)
        told = f"ignored at {', '.join(ignored[:3])}" if ignored else f"each of {count} places reaches its adapter"
        report.add("tied weights", not ignored, told)


def _reachable(chain: Chain) -> list[torch.Tensor]:
    """The chain's trained tensors, except gates and noise, which act only in training mode."""
    gates = {p for m in chain.modules() if isinstance(m, Transform) for p in m.parameters()}
    return [p for p in chain.parameters() if p.requires_grad and p not in gates]


def _unreached(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], wanted: Sequence[torch.Tensor]) -> int:
    """The number of tensors that the gradient of the model's output does not reach."""
    args, kwargs = call
    with inference_view(model), as_called(), torch.enable_grad():
        loss = sum(t.float().pow(2).sum() for t in floats(model(*args, **kwargs)))
        if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
            return len(wanted)
        return sum(g is None for g in torch.autograd.grad(loss, wanted, allow_unused=True))


@contextmanager
def _alone(model: nn.Module, site: Site, place: Site) -> Iterator[None]:
    """Within this context, adapters run at only one place of a tied weight."""
    others = [model.get_submodule(path) for path in {p.owner for p in places(site)} - {place.owner}]
    active = {owner: adapters.active for owner in others if (adapters := home(owner)) is not None}
    try:
        for owner in active:
            _switch(owner, ())
        yield
    finally:
        for owner, names in active.items():
            _switch(owner, names)


def _switch(owner: nn.Module, names: tuple[str, ...]) -> None:
    adapters = home(owner)
    assert adapters is not None
    adapters.active = names
    install(owner)
