"""The work of an export: write the graphs, open them in ONNX Runtime, and check them against PyTorch."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime as ort
from torch import nn

from graphpeft.errors import ExportError, FileError
from graphpeft.exporting import genai, onnx, parity
from graphpeft.exporting.cases import Outputs
from graphpeft.exporting.graph_export import GraphExport
from graphpeft.exporting.parity import ReferenceRun, Runner
from graphpeft.exporting.slots import fingerprint
from graphpeft.exporting.traceable import TraceableModel
from graphpeft.rewrite.state import get_state
from graphpeft.rewrite.sync import opened
from graphpeft.runtime.session import Session

Verify = Literal["off", "fast", "full"]


@dataclass
class Work:
    """One export: its settings, its graphs, and their checks."""

    model: nn.Module
    parts: Sequence[GraphExport]
    folder: Path
    opset: int
    verify: Verify
    names: tuple[str, ...]
    shared: bool
    per_row: bool
    open: Callable[[nn.Module, Sequence[str]], AbstractContextManager[TraceableModel]]
    folding: Callable[[nn.Module, tuple[str, ...]], AbstractContextManager[None]]
    """A context in which adapters are folded into the weights."""

    def __post_init__(self) -> None:
        self.facts = {
            "graphpeft.version": version("graphpeft"),
            "graphpeft.base": fingerprint(self.model),
            "graphpeft.generation": json.dumps(genai.facts(self.model)),
        }
        if onnx.oldest(self.opset):
            self.facts["graphpeft.onnxruntime"] = onnx.oldest(self.opset)

    def swappable(self) -> None:
        """Write the base graph with slots and each adapter's files, then verify."""
        with self.open(self.model, self.names) as opened:
            for part in self.parts:
                facts = self.facts | {"graphpeft.mode": "swappable"}
                part.write(opened.slots, opened.fed, facts, self.opset, len(self.parts) == 1, self.shared, self.per_row)
            self._finish()
            for name in self.names:
                self._write_adapter(name, opened)
            if self.verify == "full":
                for part, runner in self._runners():
                    part.check_slots(runner, opened.fed)
        if self.verify != "off":
            self._check_adapters()

    def merged(self) -> None:
        """Write the base graph with the adapters in its weights, then verify."""
        with _running(self.model, ()):
            base = [part.outputs() for part in self.parts]
        with _running(self.model, self.names):
            steps = [ReferenceRun(None, "merged model", part.outputs()) for part in self.parts]
        with self.folding(self.model, self.names):
            facts = self.facts | {"graphpeft.mode": "merged", "graphpeft.merged": ",".join(self.names)}
            for part in self.parts:
                part.write((), {}, facts, self.opset)
        self._finish()
        if self.verify != "off":
            moved = [len(self.parts) == 1 or _moves(s.want, before) for s, before in zip(steps, base, strict=True)]
            for (part, runner), step, before, acts in zip(self._runners(), steps, base, moved, strict=True):
                part.check_numbers(runner, [step])
                if self.verify == "full" and acts:
                    part.check_effect(runner, step, before)
            if self.verify == "full" and not any(moved):
                raise ExportError(
                    "The merged adapters do not change any graph's output. Train them, or activate others."
                )

    def quantize(self, bits: onnx.Bits, accuracy_level: int, names: Sequence[str]) -> None:
        """Replace the graphs by quantized ones, and compare them with the same rounded weights in float.

        The comparison uses prepacking, as users' sessions do: without it ONNX Runtime picks kernels that do not round.
        """
        limits = {"int4": self.parts[0].limit if accuracy_level == 0 else parity.IN_8_BITS, "int8": None}
        with tempfile.TemporaryDirectory(prefix="graphpeft-") as name:
            reference = Path(name)
            for file in self.folder.iterdir():
                if file.suffix in {".json", ".onnx_adapter"}:
                    shutil.copy(file, reference)
            for part in self.parts:
                part.quantize(bits, accuracy_level, reference)
            if self.verify != "off":
                float_session = Session(reference)
                for part, runner in self._runners(prepacked=True):
                    part.check_quantized(runner, Runner(float_session, part.name), (None, *names), limits[bits])

    def _finish(self) -> None:
        """Write the files beside the graphs."""
        genai.write(self.folder, self.model, self.parts[-1].flat)

    def _write_adapter(self, name: str, opened: TraceableModel) -> None:
        tensors = {part.name: opened.adapters[name](part.slots) for part in self.parts}
        rules = get_state(self.model).adapters[name].rules
        facts = {"base": self.facts["graphpeft.base"], "rules": rules, "ranks": opened.ranks[name]}
        onnx.write_adapter(self.folder, name, tensors, facts)

    def _check_adapters(self) -> None:
        moved = set()
        for part, runner in self._runners():
            with _running(self.model, ()):
                base = ReferenceRun(None, "base model", part.outputs())
            steps = []
            for name in self.names:
                with _running(self.model, (name,)):
                    steps.append(ReferenceRun(name, f"adapter {name!r}", part.outputs()))
            part.check_numbers(runner, [base, *steps])
            if self.verify == "full":
                # One of two graphs may have no site of an adapter.
                moving = [step for step in steps if len(self.parts) == 1 or _moves(step.want, base.want)]
                for step in moving:
                    part.check_effect(runner, step, base.want)
                moved |= {step.use for step in moving}
                part.check_swaps(runner, [*steps, base, steps[0]])
                if self.per_row:
                    part.check_rows(runner, [*steps, base])
        if self.verify == "full" and (still := [name for name in self.names if name not in moved]):
            raise ExportError(
                f"adapter {still[0]!r}: it does not change any graph's output. Train it, or leave it out (adapters=)."
            )

    def _runners(self, prepacked: bool = False) -> list[tuple[GraphExport, Runner]]:
        """Each graph in ONNX Runtime. Float graphs skip prepacking, a second copy of the weights that only adds speed."""
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if not prepacked:
            options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            session = Session(self.folder, options=options)
        except FileError as error:
            raise ExportError(f"The exported folder does not open: {error}") from error
        return [(part, Runner(session, part.name)) for part in self.parts]


def _moves(want: Sequence[Outputs], base: Sequence[Outputs]) -> bool:
    return any(
        not np.array_equal(one[name], other[name]) for one, other in zip(want, base, strict=True) for name in one
    )


@contextmanager
def _running(model: nn.Module, active: tuple[str, ...]) -> Iterator[None]:
    """Within this context exactly these adapters run."""
    known = get_state(model).active
    with opened(model, "", {name: known.get(name, 1.0) for name in active}):
        yield
