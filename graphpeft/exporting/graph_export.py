"""One graph of an export: the function in PyTorch, its ONNX translation, and the checks of one against the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir
import torch

from graphpeft.exporting import onnx, parity
from graphpeft.exporting.cases import Case, Outputs, Tensors, cases
from graphpeft.exporting.flat import Flat
from graphpeft.exporting.parity import ReferenceRun, Runner
from graphpeft.exporting.traceable import absent, probes
from graphpeft.runtime.folder import Check
from graphpeft.runtime.layout import AdapterInput, Arrays
from graphpeft.tracing import as_pass, traced

_graph = traced(lambda part: part.name)
"""Decorator: trace a method as a step with the graph's name, around the steps of its passes."""


@dataclass
class GraphExport:
    """One graph of an export; `name` is its file's name."""

    name: str
    flat: Flat
    folder: Path
    limit: float
    slots: tuple[AdapterInput, ...] = ()
    passes: tuple[str, ...] = ()
    """The graph passes that ran, in order."""
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cases = [case for case in cases(self.flat.inputs, self.flat.axes) if self._runs(case)]
        self.notes += [f"output {name!r} is not a tensor and was left out" for name in self.flat.dropped]

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.onnx"

    @_graph
    @as_pass("reference", "compute PyTorch's outputs for comparison")
    def outputs(self) -> list[Outputs]:
        """PyTorch's outputs in every case, with the active adapters."""
        return [self.flat(case.inputs) for case in self.cases]

    @_graph
    def write(
        self, slots: Sequence[AdapterInput], fed: Tensors, facts: Mapping[str, str], opset: int,
        whole: bool = True, shared: bool = False, per_row: bool = False,
    ) -> None:  # fmt: skip
        """Translate, run the passes, and save. Unless `whole`, drop slots that belong to other graphs."""
        ranks = {name: {axis: size for axis, size in enumerate(shape) if isinstance(size, str)}
                 for slot in slots for name, shape in slot.shapes.items()}  # fmt: skip
        axes = [self.flat.axes[name] for name in self.flat.inputs] + [ranks[name] for name in fed]
        module = self.flat.module(self._paths(fed))
        graph = onnx.translate(
            module, {**self.flat.inputs, **fed}, self.flat.outputs, axes, opset, prefix=self.flat.prefix
        )
        found = onnx.Slots(slots if whole else onnx.used(graph, slots))
        onnx.census(graph, found.now)
        passes = onnx.pipeline(found, swappable=bool(fed), shared=shared, per_row=per_row)
        graph = onnx.run(passes, graph)
        self.slots, self.passes = found.now, onnx.listed(passes)
        onnx.save(graph, self.path, self.slots, facts)

    @_graph
    def quantize(self, bits: onnx.Bits, accuracy_level: int, reference: Path) -> None:
        """Rewrite the graph with quantized weights, and write one to `reference` with the same rounded weights in float."""
        graph = ir.load(self.path)
        passes = onnx.quantizing(onnx.Slots(self.slots), bits, accuracy_level)
        quantized = onnx.run(passes, graph)
        self.passes += onnx.listed(passes)
        facts = dict(graph.metadata_props) | {"graphpeft.quantized": bits}
        if bits == "int4":
            facts["graphpeft.accuracy_level"] = str(accuracy_level)
        onnx.save(onnx.rounded(graph, quantized), reference / self.path.name, self.slots, facts)
        onnx.save(quantized, self.path, self.slots, facts)

    @_graph
    def check_quantized(
        self, runner: Runner, reference: Runner, uses: Sequence[str | None], limit: float | None
    ) -> None:
        self.checks += parity.check_quantized(runner, reference, uses, self.cases, limit)

    @_graph
    def check_slots(self, runner: Runner, fed: Tensors) -> None:
        """Check every slot alone. Call this while the slots are in the model."""
        module = self.flat.module(self._paths(fed))
        nothing = {name: absent(name, like, self.slots) for name, like in fed.items()}

        def reference(inputs: Tensors, values: Arrays) -> Outputs:
            given = nothing | {name: torch.from_numpy(value).to(fed[name]) for name, value in values.items()}
            found = module(*inputs.values(), *given.values())
            return {name: value.cpu().numpy() for name, value in zip(self.flat.outputs, found, strict=True)}

        alone = list(probes(self.slots, fed))
        check, unmoved = parity.check_slots(runner, reference, alone, self.cases[1], self.limit)
        self.checks.append(check)
        self.notes += [f"{site}: changes the output too little to prove that its slot works" for site in unmoved]

    @_graph
    def check_numbers(self, runner: Runner, steps: Sequence[ReferenceRun]) -> None:
        self.checks += parity.check_numbers(runner, steps, self.cases, self.limit)

    @_graph
    def check_swaps(self, runner: Runner, steps: Sequence[ReferenceRun]) -> None:
        self.checks.append(parity.check_swaps(runner, steps, self.cases, self.limit))

    @_graph
    def check_rows(self, runner: Runner, steps: Sequence[ReferenceRun]) -> None:
        self.checks.append(parity.check_rows(runner, steps, self.cases, self.limit))

    @_graph
    def check_effect(self, runner: Runner, step: ReferenceRun, base: Sequence[Outputs]) -> None:
        self.checks.append(parity.check_effect(runner, step, base, self.cases))

    def _paths(self, fed: Tensors) -> list[str]:
        model = self.flat.model
        paths = {id(tensor): path for path, tensor in (*model.named_buffers(), *model.named_parameters())}
        return [paths[id(tensor)] for tensor in fed.values()]

    def _runs(self, case: Case) -> bool:
        try:
            self.flat(case.inputs)
        except Exception as error:  # the model's own code may raise anything
            reason = next(iter(str(error).splitlines()), "")
            self.notes.append(f"not checked at {case.label}: PyTorch raises {type(error).__name__}: {reason}")
            return False
        return True
