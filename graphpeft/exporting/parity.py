"""Compare an exported graph with PyTorch: outputs at sizes that were not traced, adapter swaps, and adapter effects.

A run without an error proves nothing about adapters: ONNX Runtime silently ignores a lost slot or a dead adapter. So
comparing outputs is not enough. Probes make each slot visible: random values go into one slot at a time, in PyTorch and in
the graph, and both outputs must agree. A probe counts only if it changes PyTorch's output by at least `VISIBLE` times the
difference between the two runtimes; only then would a dead slot show up as a difference. In the same way, each adapter
must change the output by that much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from graphpeft.errors import ExportError
from graphpeft.exporting.cases import Case, Outputs, Tensors
from graphpeft.runtime.folder import Check
from graphpeft.runtime.layout import Arrays
from graphpeft.runtime.session import Session, Use
from graphpeft.tracing import as_pass, counted

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-3}
"""Largest difference, relative to the largest value if that exceeds 1. A different order of sums costs up to 3e-6 in
fp32 on small models, growing with depth, and a few roundings in fp16, whose resolution is 1e-3."""
IN_8_BITS = 0.1
"""The limit where int4 products round activations to 8 bits, each block of 32 by its largest value; it is relative to the
largest value, even if that is below 1. It is three times the difference of the trained MiniLM, 0.035; random Llamas show
0.009 to 0.028 (`python benchmarks/int4_rounding.py`). A model beyond it has outliers that dwarf the rest of their block."""
SMALL = 1e-3
"""Rounding is relative, and outputs can be small: embeddings of length 1 have no entry above 0.2. Differences are relative
to at least this value."""
VISIBLE, ROUNDING = 100, 1e-7
"""A change of the output proves something only if it is `VISIBLE` times the difference between the two runtimes, which is
at least fp32's `ROUNDING`. An export that missed such a change would be far from PyTorch."""


def tolerance(model: nn.Module) -> float:
    """The limit for differences, by the dtype of the model's weights."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if dtype not in TOLERANCE:
        raise ExportError(
            f"{type(model).__name__} has weights in {dtype}, which NumPy lacks and few of ONNX Runtime's kernels take. "
            "Convert the model first, with model.float() or model.half()."
        )
    return TOLERANCE[dtype]


def distance(got: Outputs, want: Outputs, least: float = 1.0) -> tuple[float, str]:
    """Largest difference over all outputs, relative to the largest value but at least `least`; and the output's name."""
    worst = (0.0, next(iter(want)))
    for name, expected in want.items():
        x, y = np.asarray(got[name], np.float64), np.asarray(expected, np.float64)
        if x.shape != y.shape:
            return float("inf"), f"{name} (shape {x.shape} instead of {y.shape})"
        gap = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, np.abs(x - y))
        gap = np.where(np.isnan(gap), np.inf, gap)
        scale = np.max(np.abs(y), where=np.isfinite(y), initial=least)
        worst = max(worst, (float(gap.max(initial=0.0) / scale), name))
    return worst


@dataclass(frozen=True)
class Runner:
    """One graph of a session."""

    session: Session
    part: str

    def use(self, adapters: Use) -> None:
        self.session.use(adapters)

    def run(self, case: Case, extra: Mapping[str, np.ndarray] | None = None) -> Outputs:
        graph = self.session.graphs[self.part]
        if extra is None:
            return graph.run(case.arrays)
        found = graph.inference.run(graph.outputs, case.arrays | dict(extra))
        return dict(zip(graph.outputs, found, strict=True))


@dataclass(frozen=True)
class ReferenceRun:
    """The adapter for a session to use, its name in messages, and PyTorch's outputs in every case."""

    use: str | None
    subject: str
    want: Sequence[Outputs]


@as_pass("check-numbers", "compare ONNX Runtime with PyTorch")
def check_numbers(
    session: Runner, steps: Sequence[ReferenceRun], cases: Sequence[Case], limit: float, test: str = "numbers"
) -> list[Check]:
    """Run `steps` on one session in each case, and compare with PyTorch.

    Raises:
        ExportError: a difference exceeds the limit.
    """
    found: dict[str, float] = {}
    for number, case in counted(list(enumerate(cases))):
        for step in steps:
            session.use(step.use)
            value, output = distance(_run(session, step, case), step.want[number])
            if not value <= limit:
                raise _off(f"{step.subject} ({test})", case, output, value, limit)
            found[step.subject] = max(found.get(step.subject, 0.0), value)
    return [Check(test, subject, value, limit) for subject, value in found.items()]


@as_pass("check-swaps", "swap adapters on one session and compare")
def check_swaps(session: Runner, steps: Sequence[ReferenceRun], cases: Sequence[Case], limit: float) -> Check:
    """Run `steps` on one session, as `check_numbers` does, to show that no adapter stays active after a swap."""
    sequence = " > ".join(step.use or "base" for step in steps)
    found = check_numbers(session, steps, cases, limit, "swap")
    return Check("swap", sequence, max(check.value for check in found), limit)


@as_pass("check-effect", "check that an adapter changes the output")
def check_effect(session: Runner, step: ReferenceRun, base: Sequence[Outputs], cases: Sequence[Case]) -> Check:
    """Check that the adapter changes PyTorch's output by far more than ONNX Runtime differs from PyTorch.

    Raises:
        ExportError: the adapter's effect is too small to be visible.
    """
    session.use(step.use)
    gap = max(distance(_run(session, step, case), want)[0] for case, want in zip(cases, step.want, strict=True))
    moves = max(distance(_seen(want), _seen(without))[0] for want, without in zip(step.want, base, strict=True))
    limit = VISIBLE * max(gap, ROUNDING)
    if moves < limit:
        raise ExportError(
            f"{step.subject}: it moves PyTorch's output by {moves:.2g}, and the export is {gap:.2g} off; a change of at least "
            f"{limit:.2g} would show that the adapter works. Usual cause: it was never trained. Remedy: train it, "
            'leave it out (`adapters=`), or skip this check with verify="fast".'
        )
    return Check("effect", step.subject, moves, limit, True)


def _seen(outputs: Outputs) -> Outputs:
    """Outputs without the KV cache: a changed cache does not show that the logits changed."""
    return {name: value for name, value in outputs.items() if not name.startswith("present.")}


@as_pass("check-slots", "fill one slot at a time and compare")
def check_slots(
    session: Runner,
    reference: Callable[[Tensors, Arrays], Outputs],
    probes: Sequence[tuple[str, Arrays, Arrays]],
    case: Case,
    limit: float,
) -> tuple[Check, list[str]]:
    """Fill one site's slot at a time, and compare with `reference(inputs, values)` in PyTorch.

    `probes` are (site, values for PyTorch, values for the graph). Also returns the sites whose probes change PyTorch's
    output too little to prove anything.

    Raises:
        ExportError: names the site whose slot acts differently in ONNX Runtime and PyTorch.
    """
    session.use(None)
    base = reference(case.inputs, {})
    worst, output = _gap(session, case, {}, base)
    if not worst <= limit:
        raise _off("base model (slots)", case, output, worst, limit)
    visible = VISIBLE * max(worst, ROUNDING)
    unmoved = []
    for site, values, fed in counted(probes):
        want = reference(case.inputs, values)
        moves = distance(want, base)[0]
        value, output = _gap(session, case, fed, want)
        if not value <= limit or value > moves / 10 >= visible / 10:
            raise ExportError(
                f"{site}: filling this slot alone moves the output by {moves:.2g} in PyTorch, and output "
                f"{output!r} of the export is {value:.2g} off. Usual cause: tracing specialized a branch around the weight "
                "to the sample. Remedy: leave this site out of the rules, or export with merged=True."
            )
        worst = max(worst, value)
        if moves < visible:
            unmoved.append(site)
    return Check("slots", f"{len(probes)} sites, one at a time", worst, limit), unmoved


@as_pass("check-rows", "run a different adapter on each row and compare")
def check_rows(session: Runner, steps: Sequence[ReferenceRun], cases: Sequence[Case], limit: float) -> Check:
    """Give the rows of a batch different adapters, or none, and compare each row with PyTorch under its adapter.

    Raises:
        ExportError: a row does not match its adapter.
    """
    worst = 0.0
    for number, case in enumerate(cases):
        rows = next(iter(case.inputs.values())).shape[0]
        chosen = [steps[row % len(steps)] for row in range(rows)]
        session.use([step.use for step in chosen])
        want = {name: np.stack([step.want[number][name][row] for row, step in enumerate(chosen)])
                for name in steps[0].want[number]}  # fmt: skip
        value, output = distance(_run(session, ReferenceRun(None, "rows", ()), case), want)
        if not value <= limit:
            raise _off("an adapter for each row", case, output, value, limit)
        worst = max(worst, value)
    return Check("rows", ", ".join(step.use or "base" for step in steps), worst, limit)


@as_pass("check-quantized", "compare the quantized graph with float")
def check_quantized(
    session: Runner, reference: Runner, uses: Sequence[str | None], cases: Sequence[Case], limit: float | None
) -> list[Check]:
    """Compare a quantized graph with a float graph that has the same rounded weights, under every adapter.

    `limit=None` is for dynamically rounded activations, where one outlier makes the rounding arbitrarily coarse. Then an
    adapter passes if the output differs from the reference by less than half of the adapter's own effect.

    Raises:
        ExportError: an adapter acts differently in the quantized graph and in float.
    """
    checks = []
    base: list[Outputs] = []
    noise = 0.0  # the difference without an adapter
    for use in uses:
        step = ReferenceRun(use, f"adapter {use!r}" if use else "base model", ())
        session.use(use)
        reference.use(use)
        want = [_run(reference, step, case) for case in cases]
        base = base or want
        value, output = max(distance(_run(session, step, c), one, SMALL) for c, one in zip(cases, want, strict=True))
        moves = max(distance(_seen(one), _seen(other), SMALL)[0] for one, other in zip(want, base, strict=True))
        most = limit if limit is not None else moves / 2 if use else float("inf")
        if limit == IN_8_BITS and use:  # a lost adapter differs by its whole effect, unless rounding hides it
            most = min(limit, max(moves / 2, 3 * noise, TOLERANCE[torch.float16]))
        noise = noise if use else value
        if not value <= most:
            raise ExportError(
                f"{step.subject}: output {output!r} of the quantized graph is {value:.2g} off the same weights in float, more "
                f"than {most:.2g}. Usual cause: outliers among activations, rounded to 8 bits. Remedy: "
                'quantize="int4" with accuracy_level=0, which does not round activations, or no quantize.'
            )
        if most < float("inf"):
            checks.append(Check("quantized", step.subject, value, most))
    return checks


def _off(subject: str, case: Case, output: str, value: float, limit: float) -> ExportError:
    return ExportError(
        f"{subject}, {case.label}: output {output!r} of the exported graph differs from PyTorch by {value:.2g}, more "
        f"than {limit:.2g}. Usual causes: a size or branch that tracing specialized to the sample, or, for an adapter only, "
        "an update that the slots do not reproduce. Remedy: pass other sample `inputs`, of unequal sizes, or use "
        "merged=True."
    )


def _gap(session: Runner, case: Case, fed: Mapping[str, np.ndarray], want: Outputs) -> tuple[float, str]:
    with _explained("slots", case):
        got = session.run(case, fed)
    return distance(got, want)


def _run(session: Runner, step: ReferenceRun, case: Case) -> Outputs:
    with _explained(step.subject, case):
        return session.run(case)


@contextmanager
def _explained(subject: str, case: Case) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # ONNX Runtime's errors have no common base class
        raise ExportError(
            f"{subject}, {case.label}: ONNX Runtime cannot run the exported graph: {error} Usual causes: an opset "
            "that this ONNX Runtime supports only in part, or a size that tracing specialized to the sample. Remedy: leave "
            "`opset` out, or pass other sample `inputs`, of unequal sizes."
        ) from error
