"""Ship a model to ONNX Runtime: one base graph with swappable adapters, or the active adapters folded in.

The effect: files in a folder of their own, nothing else. The model is rewritten or merged while the export runs
and handed back bit for bit as it was.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from torch import nn

from graphpeft.ambient import as_called, plain
from graphpeft.capturing.capture import Inputs, quiet
from graphpeft.errors import ExportError, FileError
from graphpeft.exporting import genai, onnx, parity
from graphpeft.exporting.cases import Outputs
from graphpeft.exporting.opening import Opened, as_pairs, as_trained
from graphpeft.exporting.parity import Runner, Step
from graphpeft.exporting.part import Part, Pass
from graphpeft.exporting.parts import parts
from graphpeft.exporting.request import check_options, exported_names, refuse_inexportable
from graphpeft.exporting.slots import fingerprint
from graphpeft.passes.merge import merge, unmerge
from graphpeft.rewrite.state import get_state, set_active
from graphpeft.runtime.folder import ExportReport, sizes, staged
from graphpeft.runtime.session import Session
from graphpeft.tracing import as_pass

Verify = Literal["off", "fast", "full"]


@as_pass("export", "reference to write, as below, and all checks")
@plain()
def export(
    model: nn.Module,
    path: str | Path,
    *,
    merged: bool = False,
    adapters: str | Sequence[str] | None = None,
    inputs: Inputs = None,
    cache: bool = True,
    rows: bool = False,
    share: bool = False,
    compact: bool = False,
    quantize: onnx.Bits | None = None,
    accuracy_level: int = onnx.ROUNDED,
    tokenizer: Any = None,
    opset: int | None = None,
    verify: Verify = "full",
) -> ExportReport:
    """Write `path/model.onnx` and, unless merged, one `NAME.onnx_adapter` per adapter; check them against PyTorch.

    A model that generates from an encoder's states becomes two graphs, `encoder.onnx` and `decoder.onnx`.

    Args:
        model: a model with adapters. It is exported as in evaluation mode.
        path: a folder: new, empty, or of an earlier export, which is then replaced as a whole.
        merged: fold the active adapters into the weights; the graph is then the base model's with other numbers.
            Otherwise it is the base model's with a slot at every adapted weight, for adapters of any rank.
        adapters: names of those to write; default: all. `merged` folds what is active and takes no names.
        inputs: a sample call; default: made from the model's config. Batch size (axis 0) and lengths (axis 1 of 2-D
            integer inputs) become dynamic; in the sample they must be unequal and at least 2.
        cache: where the model generates text, take its past (`past_key_values.0.key`) and give it back (`present.0.key`), so
            that one graph serves the prompt and every later token.
        rows: gate every slot, so that each row of a batch can have its own adapter or blend (`Session.use`).
        share: one product with A for all slots that read the same activation, instead of a slot for each weight, whose names
            and shapes are those of `olive convert-adapters`. Fewer launches, but each B has zeros in the others' rows.
        compact: hold open what the method trains, in its own shapes, instead of a pair: kilobytes for VeRA, RLoRA, MELoRA
            or a compacted B-LoRA, whose integers stay integers. All adapters then have to be of one method and seed.
        quantize: "int4" (weights in blocks of 32) or "int8" for the base's matrices; adapters stay float and read activations
            that nobody rounded. The float graph is verified first, then the quantized one, as users run it, against its weights.
        accuracy_level: ONNX Runtime's, of int4 products: 4 rounds their activations to 8 bits, in blocks, and decodes about twice
            as fast; 0 leaves them as they are. int8 rounds activations as they come, in either case.
        tokenizer: of transformers; its files are saved beside the graph, for `graphpeft run` and onnxruntime-genai.
        opset: 18 or later; default: 23, with which decoders run faster. A lower one is for older runtimes; the report says with
            which ones it was tried.
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
    opset = onnx.DEFAULT_OPSET if opset is None else opset
    check_options(verify, quantize, accuracy_level, compact, rows, merged)
    chosen = exported_names(model, merged, adapters)
    refuse_inexportable(model)
    with quiet(model), as_called(), _restored(model), staged(Path(path)) as folder:
        limit = parity.tolerance(model)
        pieces = [Part(name, flat, folder, limit) for name, flat in parts(model, inputs, cached=cache)]
        if cache and getattr(model, "can_generate", lambda: False)() and not pieces[-1].flat.cache:
            pieces[-1].notes.append(
                "no past among the inputs: the model keeps something else, or the sample has other inputs"
            )
        work = _Export(model, pieces, folder, opset, verify, chosen, _passes(share and not compact, rows), rows,
                       as_trained if compact else as_pairs)  # fmt: skip
        work.merged() if merged else work.swappable()
        if quantize is not None:
            work.quantize(quantize, accuracy_level, () if merged else chosen)
        for part in pieces:
            figures = [check.value for check in part.checks if not check.least]
            onnx.annotate(part.path, {"graphpeft.tolerance": f"{max(figures):.2g}"} if figures else {})
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        report = ExportReport(
            path=str(path),
            mode="merged" if merged else "swappable",
            adapters=chosen,
            slots=sum(len(part.slots) for part in pieces),
            opset=onnx.opset(pieces[0].path),
            verify=verify,
            files=sizes(folder),
            checks=tuple(check for part in pieces for check in part.checks),
            notes=tuple(note for part in pieces for note in part.notes),
            versions={name: version(name) for name in ("graphpeft", "torch", "onnx", "onnxruntime")},
            seconds=round(time.perf_counter() - start, 2),
            onnxruntime=onnx.oldest(opset),
        )
        report.save(folder)
    return report


def _passes(share: bool, rows: bool) -> tuple[Pass, ...]:
    chosen = {onnx.share: share, onnx.gate_rows: rows, onnx.fuse_sums: True}
    return tuple(one for one, wanted in chosen.items() if wanted)


@dataclass
class _Export:
    """One export under way: its task, and what it finds."""

    model: nn.Module
    parts: Sequence[Part]
    folder: Path
    opset: int
    verify: Verify
    names: tuple[str, ...]
    passes: Sequence[Pass]
    rows: bool
    open: Callable[[nn.Module, Sequence[str]], AbstractContextManager[Opened]]

    def __post_init__(self) -> None:
        self.facts = {
            "graphpeft.version": version("graphpeft"),
            "graphpeft.base": fingerprint(self.model),
            "graphpeft.generation": json.dumps(genai.facts(self.model)),
        }
        if onnx.oldest(self.opset):
            self.facts["graphpeft.onnxruntime"] = onnx.oldest(self.opset)

    def swappable(self) -> None:
        """Write the base graph with slots and files for each adapter, then verify."""
        with self.open(self.model, self.names) as opened:
            for part in self.parts:
                facts = self.facts | {"graphpeft.mode": "swappable"}
                part.write(opened.slots, opened.fed, self.passes, facts, self.opset, whole=len(self.parts) == 1)
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
            steps = [Step(None, "merged model", part.outputs()) for part in self.parts]
        merge(self.model, self.names)
        try:
            facts = self.facts | {"graphpeft.mode": "merged", "graphpeft.merged": ",".join(self.names)}
            for part in self.parts:
                part.write((), {}, (), facts, self.opset)
        finally:
            unmerge(self.model)
        self._finish()
        if self.verify != "off":
            moved = [len(self.parts) == 1 or _moves(s.want, before) for s, before in zip(steps, base, strict=True)]
            for (part, runner), step, before, acts in zip(self._runners(), steps, base, moved, strict=True):
                part.check_numbers(runner, [step])
                if self.verify == "full" and acts:
                    part.check_effect(runner, step, before)
            if self.verify == "full" and not any(moved):
                raise ExportError("The merged adapters move no graph's output. Train them, or activate others.")

    def quantize(self, bits: onnx.Bits, accuracy_level: int, names: Sequence[str]) -> None:
        """Replace the graphs by quantized ones, and hold those against the same rounded weights in float.

        In the session that users get: without prepacking ONNX Runtime takes other kernels, which round nothing.
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
        """What stands beside the graphs."""
        genai.write(self.folder, self.model, self.parts[-1].flat)

    def _write_adapter(self, name: str, opened: Opened) -> None:
        tensors = {part.name: opened.adapters[name](part.slots) for part in self.parts}
        rules = get_state(self.model).adapters[name].rules
        facts = {"base": self.facts["graphpeft.base"], "rules": rules, "ranks": opened.ranks[name]}
        onnx.write_adapter(self.folder, name, tensors, facts)

    def _check_adapters(self) -> None:
        moved = set()
        for part, runner in self._runners():
            with _running(self.model, ()):
                base = Step(None, "base model", part.outputs())
            steps = []
            for name in self.names:
                with _running(self.model, (name,)):
                    steps.append(Step(name, f"adapter {name!r}", part.outputs()))
            part.check_numbers(runner, [base, *steps])
            if self.verify == "full":
                # Of two graphs, one may have no site of an adapter.
                moving = [step for step in steps if len(self.parts) == 1 or _moves(step.want, base.want)]
                for step in moving:
                    part.check_effect(runner, step, base.want)
                moved |= {step.use for step in moving}
                part.check_swaps(runner, [*steps, base, steps[0]])
                if self.rows:
                    part.check_rows(runner, [*steps, base])
        if self.verify == "full" and (still := [name for name in self.names if name not in moved]):
            raise ExportError(
                f"adapter {still[0]!r}: it moves no graph's output. Train it, or leave it out (adapters=)."
            )

    def _runners(self, prepacked: bool = False) -> list[tuple[Part, Runner]]:
        """Each graph in ONNX Runtime; float ones without prepacking, which is a second copy of the weights, for speed."""
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
