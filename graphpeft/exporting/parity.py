"""Does an exported graph do what PyTorch does? Numbers at sizes it was not traced with, swaps, and effects.

A run without an error proves nothing about adapters: ONNX Runtime ignores a lost slot or a dead adapter in
silence. So a check on numbers is never enough; each adapter must also be seen to move the output.
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
"""Largest difference, relative to the largest value where that exceeds 1. Sums in another order cost up to 3e-6 in
fp32 on small models, growing with depth; in fp16, whose resolution is 1e-3, a few roundings."""
IN_8_BITS = 0.1
"""The same, relative to the largest value of whatever size, where int4 products round their activations to 8 bits, each block of
32 by its largest value. Three times what the trained MiniLM shows, 0.035; random Llamas show 0.009 to 0.028
(`python benchmarks/int4_rounding.py`). A model beyond it has outliers that dwarf what stands beside them."""
SMALL = 1e-3
"""Rounding is relative: embeddings of length 1 have no entry above 0.2. Outputs below this count as zero."""
VISIBLE, ROUNDING = 100, 1e-7
"""A change of the output counts if it is this many times what separates the two runtimes anyway, which is at least the
rounding of fp32. An export that missed such a change would be far off PyTorch; smaller ones prove nothing."""


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
    """Largest difference over all outputs, relative to the largest value or to `least` if that is larger; and where it is."""
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
    """What a session is told to use, what that is called in messages, and PyTorch's outputs in every case."""

    use: str | None
    subject: str
    want: Sequence[Outputs]


@as_pass("check-numbers", "ONNX Runtime against PyTorch")
def check_numbers(
    session: Runner, steps: Sequence[ReferenceRun], cases: Sequence[Case], limit: float, test: str = "numbers"
) -> list[Check]:
    """Go through `steps` on one session in each case and compare with PyTorch.

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


@as_pass("check-swaps", "adapters one after the other")
def check_swaps(session: Runner, steps: Sequence[ReferenceRun], cases: Sequence[Case], limit: float) -> Check:
    """Go through `steps` on one session, as `check_numbers` does, to show that no adapter outlives its use."""
    sequence = " > ".join(step.use or "base" for step in steps)
    found = check_numbers(session, steps, cases, limit, "swap")
    return Check("swap", sequence, max(check.value for check in found), limit)


@as_pass("check-effect", "whether an adapter moves the output")
def check_effect(session: Runner, step: ReferenceRun, base: Sequence[Outputs], cases: Sequence[Case]) -> Check:
    """Check that the step moves PyTorch's output off the base, by far more than ONNX Runtime is off PyTorch.

    Raises:
        ExportError: the adapter cannot be told from none.
    """
    session.use(step.use)
    gap = max(distance(_run(session, step, case), want)[0] for case, want in zip(cases, step.want, strict=True))
    moves = max(distance(_seen(want), _seen(without))[0] for want, without in zip(step.want, base, strict=True))
    limit = VISIBLE * max(gap, ROUNDING)
    if moves < limit:
        raise ExportError(
            f"{step.subject}: it moves PyTorch's output by {moves:.2g}, and the export is {gap:.2g} off; it takes "
            f"{limit:.2g} to show that the adapter works there. Usual cause: it was never trained. Remedy: train it, "
            'leave it out (`adapters=`), or skip this check with verify="fast".'
        )
    return Check("effect", step.subject, moves, limit, True)


def _seen(outputs: Outputs) -> Outputs:
    """What is asked for: a past that changed proves nothing about what is made of it."""
    return {name: value for name, value in outputs.items() if not name.startswith("present.")}


@as_pass("check-slots", "every slot by itself")
def check_slots(
    session: Runner,
    reference: Callable[[Tensors, Arrays], Outputs],
    probes: Sequence[tuple[str, Arrays, Arrays]],
    case: Case,
    limit: float,
) -> tuple[Check, list[str]]:
    """Fill one site's slot at a time and compare with `reference(inputs, values)` of PyTorch.

    `probes` are sites, PyTorch's values and the graph's. Also returns the sites that change too little, in PyTorch, to
    prove anything.

    Raises:
        ExportError: names the site whose slot does not do in ONNX Runtime what it does in PyTorch.
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
                f"{site}: what is fed to this slot alone moves the output by {moves:.2g} in PyTorch, and output "
                f"{output!r} of the export is {value:.2g} off. Usual cause: tracing fixed a branch around the weight "
                "to the sample. Remedy: leave this site out of the rules, or export with merged=True."
            )
        worst = max(worst, value)
        if moves < visible:
            unmoved.append(site)
    return Check("slots", f"{len(probes)} sites, one at a time", worst, limit), unmoved


@as_pass("check-rows", "another adapter for each row")
def check_rows(session: Runner, steps: Sequence[ReferenceRun], cases: Sequence[Case], limit: float) -> Check:
    """Give every row of a batch another adapter, or none, and compare each with PyTorch's row under that adapter.

    Raises:
        ExportError: a row gets something else than its adapter.
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


@as_pass("check-quantized", "quantized against float")
def check_quantized(
    session: Runner, reference: Runner, uses: Sequence[str | None], cases: Sequence[Case], limit: float | None
) -> list[Check]:
    """Compare a quantized graph with one in float that has the same rounded weights, under every adapter.

    Without a limit, activations are rounded as they come, as far as one outlier among them makes it: then what counts is that
    an output is nearer to the reference's with the same adapter than halfway to that without one.

    Raises:
        ExportError: an adapter does not do in the quantized graph what it does in float.
    """
    checks = []
    base: list[Outputs] = []
    noise = 0.0  # of the base
    for use in uses:
        step = ReferenceRun(use, f"adapter {use!r}" if use else "base model", ())
        session.use(use)
        reference.use(use)
        want = [_run(reference, step, case) for case in cases]
        base = base or want
        value, output = max(distance(_run(session, step, c), one, SMALL) for c, one in zip(cases, want, strict=True))
        moves = max(distance(_seen(one), _seen(other), SMALL)[0] for one, other in zip(want, base, strict=True))
        most = limit if limit is not None else moves / 2 if use else float("inf")
        if limit == IN_8_BITS and use:  # a lost adapter is off by all that it does, unless rounding hides it
            most = min(limit, max(moves / 2, 3 * noise, TOLERANCE[torch.float16]))
        noise = noise if use else value
        if not value <= most:
            raise ExportError(
                f"{step.subject}: output {output!r} of the quantized graph is {value:.2g} off the same weights in float, more "
                f"than {most:.2g}. Usual cause: activations with outliers, in 8 bits. Remedy: "
                'quantize="int4" with accuracy_level=0, which leaves activations as they are, or no quantize.'
            )
        if most < float("inf"):
            checks.append(Check("quantized", step.subject, value, most))
    return checks


def _off(subject: str, case: Case, output: str, value: float, limit: float) -> ExportError:
    return ExportError(
        f"{subject}, {case.label}: output {output!r} of the exported graph differs from PyTorch by {value:.2g}, more "
        f"than {limit:.2g}. Usual causes: a size or branch that tracing fixed to the sample, or, for an adapter only, "
        "a delta that the slots do not reproduce. Remedy: pass other sample `inputs`, of unequal sizes, or use "
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
    except Exception as error:  # ONNX Runtime's errors have no class of their own in common
        raise ExportError(
            f"{subject}, {case.label}: ONNX Runtime cannot run the exported graph: {error} Usual causes: an opset "
            "whose operators this ONNX Runtime has in part, or a size that tracing fixed to the sample's. Remedy: leave "
            "`opset` out, or pass other sample `inputs`, of unequal sizes."
        ) from error
