"""Ship a model to ONNX Runtime: one base graph with swappable adapters, or the active adapters folded in.

The effect: files in a folder of their own, nothing else. The model is rewritten or merged while the export runs
and handed back bit for bit as it was.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from graphpeft import onnx, parity
from graphpeft.capture import Inputs, quiet
from graphpeft.deploy import REPORT, Check, ExportReport, sizes, staged
from graphpeft.errors import ExportError, FileError
from graphpeft.flat import Flat
from graphpeft.parity import Case, Outputs, Step, Tensors
from graphpeft.passes.merge import merge, unmerge
from graphpeft.program import stored
from graphpeft.runtime import Session
from graphpeft.slots import Pairs, Slot, SlotBranch, fingerprint, inserted, lower
from graphpeft.state import chains, get_state, names, set_active

Verify = Literal["off", "fast", "full"]


def export(
    model: nn.Module,
    path: str | Path,
    *,
    merged: bool = False,
    adapters: str | Sequence[str] | None = None,
    inputs: Inputs = None,
    cache: bool = True,
    opset: int | None = None,
    verify: Verify = "full",
) -> ExportReport:
    """Write `path/model.onnx` and, unless merged, one `NAME.onnx_adapter` per adapter; check them against PyTorch.

    Args:
        model: a model with adapters. It is exported as in evaluation mode, without a key-value cache.
        path: a folder: new, empty, or of an earlier export, which is then replaced as a whole.
        merged: fold the active adapters into the weights; the graph is then the base model's with other numbers.
            Otherwise it is the base model's with a slot at every adapted weight, for adapters of any rank.
        adapters: names of those to write; default: all. `merged` folds what is active and takes no names.
        inputs: a sample call; default: made from the model's config. Batch size (axis 0) and lengths (axis 1 of 2-D
            integer inputs) become dynamic; in the sample they must be unequal and at least 2.
        opset: 18 or later; default: that of torch.onnx.
        verify: `off`: the graph's structure only. `fast`: also ONNX Runtime against PyTorch, at sizes that were not
            traced. `full`: also every slot by itself, swaps on one session, and that each adapter moves the output.

    Returns:
        A report with the figure of every check; it is saved as `path/graphpeft.json`.

    Raises:
        ExportError: the model cannot be exported, or a check failed.
        AdapterError: the model has no such adapters, or cannot be merged.

    After an error the folder is as it was before.
    """
    start = time.perf_counter()
    if verify not in ("off", "fast", "full"):
        raise ExportError(f'verify={verify!r}: it is one of "off", "fast", "full".')
    chosen = _chosen(model, merged, adapters)
    with quiet(model), _restored(model), staged(Path(path)) as folder:
        work = _Export(Flat.of(model, inputs, cached=cache), folder, opset, verify, chosen)
        work.merged() if merged else work.swappable()
        figures = [check.value for check in work.checks if not check.least]
        onnx.annotate(work.path, {"graphpeft.tolerance": f"{max(figures):.2g}"} if figures else {})
        report = ExportReport(
            path=str(path),
            mode="merged" if merged else "swappable",
            adapters=chosen,
            slots=len(work.slots),
            opset=onnx.opset(work.path),
            verify=verify,
            files=sizes(folder),
            checks=tuple(work.checks),
            notes=tuple(work.notes),
            versions={name: version(name) for name in ("graphpeft", "torch", "onnx", "onnxruntime")},
            seconds=round(time.perf_counter() - start, 2),
        )
        report.save(folder)
    return report


@dataclass
class _Export:
    """One export under way: its task, and what it finds."""

    flat: Flat
    folder: Path
    opset: int | None
    verify: Verify
    names: tuple[str, ...]
    slots: tuple[Slot, ...] = ()
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = self.flat.model
        self.path = self.folder / "model.onnx"
        self.base = fingerprint(self.model)
        self.tolerance = parity.tolerance(self.model)
        self.cases = [case for case in parity.cases(self.flat.inputs, self.flat.axes) if self._runs(case)]
        self.notes += [f"output {name!r} is no tensor and was left out" for name in self.flat.dropped]

    def swappable(self) -> None:
        """Write the base graph with slots and a file per adapter, then verify."""
        adapters = {name: chains(self.model, name) for name in self.names}
        sites = {site.weight: site for found in adapters.values() for site in found}
        slots = {weight: Slot.at(site, f"rank_{i}") for i, (weight, site) in enumerate(sites.items())}
        self.slots = tuple(slots.values())
        for name, found in adapters.items():
            self._write_adapter(name, lower(found), slots)
        branches = {weight: SlotBranch(slots[weight], stored(self.model, weight)) for weight in sites}
        with inserted(self.model, {sites[weight]: branch for weight, branch in branches.items()}):
            paths = {id(parameter): path for path, parameter in self.model.named_parameters()}
            fed = {slots[weight].a: branch.A for weight, branch in branches.items()}
            fed |= {slots[weight].b: branch.B for weight, branch in branches.items()}
            module = self.flat.module([paths[id(tensor)] for tensor in fed.values()])
            self._write_graph(module, fed, {"graphpeft.mode": "swappable"})
            if self.verify == "full":
                self._check_slots(module, fed)
        if self.verify != "off":
            self._check_adapters()

    def merged(self) -> None:
        """Write the base graph with the adapters in its weights, then verify."""
        with _running(self.model, ()):
            base = self._outputs()
        with _running(self.model, self.names):
            step = Step(None, "merged model", self._outputs())
        merge(self.model, self.names)
        try:
            facts = {"graphpeft.mode": "merged", "graphpeft.merged": ",".join(self.names)}
            self._write_graph(self.flat.module(), {}, facts)
        finally:
            unmerge(self.model)
        if self.verify != "off":
            session = self._session()
            self.checks += parity.check_numbers(session, [step], self.cases, self.tolerance)
            if self.verify == "full":
                self.checks.append(parity.check_effect(session, step, base, self.cases))

    def _write_graph(self, module: nn.Module, fed: Tensors, facts: Mapping[str, str]) -> None:
        ranks = {slot.a: {1: slot.rank} for slot in self.slots} | {slot.b: {0: slot.rank} for slot in self.slots}
        axes = [self.flat.axes[name] for name in self.flat.inputs] + [ranks[name] for name in fed]
        graph = onnx.translate(module, {**self.flat.inputs, **fed}, self.flat.outputs, axes, self.opset)
        onnx.census(graph, self.slots)
        onnx.attach_defaults(graph, self.slots)
        known = {"graphpeft.version": version("graphpeft"), "graphpeft.base": self.base}
        onnx.save(graph, self.path, self.slots, {**known, **facts})

    def _write_adapter(self, name: str, pairs: Pairs, slots: Mapping[str, Slot]) -> None:
        tensors: dict[str, Tensor] = {}
        for weight, (a, b) in pairs.items():
            dtype = stored(self.model, weight).dtype
            tensors |= {slots[weight].a: a.to(dtype), slots[weight].b: b.to(dtype)}
        ranks = {slots[weight].site: a.shape[1] for weight, (a, _) in pairs.items()}
        facts = {"base": self.base, "rules": get_state(self.model).adapters[name].rules, "ranks": ranks}
        onnx.write_adapter(self.folder, name, tensors, facts)

    def _check_slots(self, module: nn.Module, fed: Tensors) -> None:
        def reference(inputs: Tensors, slots: Tensors) -> Outputs:
            tensors = [slots[name].to(place) for name, place in fed.items()]
            found = module(*inputs.values(), *tensors)
            return {name: value.cpu().numpy() for name, value in zip(self.flat.outputs, found, strict=True)}

        found = parity.check_slots(self._session(), reference, self.slots, self.cases[-1], fed, self.tolerance)
        self.checks.append(found[0])
        self.notes += [f"{site}: moves the output too little to prove that its slot works" for site in found[1]]

    def _check_adapters(self) -> None:
        session = self._session()
        with _running(self.model, ()):
            base = Step(None, "base model", self._outputs())
        steps = []
        for name in self.names:
            with _running(self.model, (name,)):
                steps.append(Step(name, f"adapter {name!r}", self._outputs()))
        self.checks += parity.check_numbers(session, [base, *steps], self.cases, self.tolerance)
        if self.verify == "full":
            self.checks += [parity.check_effect(session, step, base.want, self.cases) for step in steps]
            self.checks.append(parity.check_swaps(session, [*steps, base, steps[0]], self.cases, self.tolerance))

    def _runs(self, case: Case) -> bool:
        try:
            self.flat(case.inputs)
        except Exception as error:  # of any kind: it is the model's own code that runs
            reason = next(iter(str(error).splitlines()), "")
            self.notes.append(f"not checked at {case.label}: PyTorch refuses it, {type(error).__name__}: {reason}")
            return False
        return True

    def _session(self) -> Session:
        try:
            return Session(self.folder)
        except FileError as error:
            raise ExportError(f"The exported folder does not open: {error}") from error

    def _outputs(self) -> list[Outputs]:
        return [self.flat(case.inputs) for case in self.cases]


def _chosen(model: nn.Module, merged: bool, adapters: str | Sequence[str] | None) -> tuple[str, ...]:
    state = get_state(model)
    if not merged:
        chosen = names(model, adapters if adapters is None or isinstance(adapters, str) else tuple(adapters))
    elif adapters is not None:
        raise ExportError("merged=True folds the active adapters and takes no names; gp.activate chooses them.")
    else:
        chosen = state.merged or state.active
    if not chosen:
        raise ExportError("No adapter is " + ("active: call gp.activate(model, name) first." if merged else "chosen."))
    if Path(REPORT).stem in chosen:
        raise ExportError(f"No adapter can be called {Path(REPORT).stem!r}: its sidecar would be the report {REPORT}.")
    return tuple(dict.fromkeys(chosen))


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Take a merge back for a while; afterwards merge again, and let what was trained be trained."""
    merged = get_state(model).merged
    if merged:
        unmerge(model)
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, required in trained:
            parameter.requires_grad_(required)
        if merged:
            merge(model, merged)


@contextmanager
def _running(model: nn.Module, active: tuple[str, ...]) -> Iterator[None]:
    """Run exactly these adapters for a while."""
    before = get_state(model).active
    set_active(model, active)
    try:
        yield
    finally:
        set_active(model, before)
