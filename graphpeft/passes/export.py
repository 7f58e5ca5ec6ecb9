"""Export a model to ONNX Runtime: one base graph with swappable adapters, or a graph with the active adapters folded in.

The only effect is a folder of files. The export rewrites or merges the model while it runs, and restores it bit for bit.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from graphpeft.ambient import as_called, plain
from graphpeft.capturing.capture import Inputs, inference_view
from graphpeft.exporting import onnx, parity
from graphpeft.exporting.graph_export import GraphExport
from graphpeft.exporting.parts import parts
from graphpeft.exporting.request import check_options, exported_names, refuse_inexportable
from graphpeft.exporting.traceable import as_pairs, as_trained
from graphpeft.exporting.work import Verify, Work
from graphpeft.passes.merge import merge, unmerge
from graphpeft.rewrite.entry import on_model
from graphpeft.rewrite.state import get_state
from graphpeft.runtime.folder import ExportReport, sizes, staged
from graphpeft.tracing import as_pass


@as_pass("export", "write ONNX graphs and adapter files, and check them")
@plain()
@on_model()
def export(
    model: nn.Module,
    path: str | Path,
    *,
    merged: bool = False,
    adapters: str | Sequence[str] | None = None,
    inputs: Inputs = None,
    cache: bool = True,
    per_row: bool = False,
    share: bool = False,
    compact: bool = False,
    quantize: onnx.Bits | None = None,
    accuracy_level: int = onnx.ROUNDED,
    tokenizer: Any = None,
    opset: int | None = None,
    verify: Verify = "full",
    rows: bool | None = None,
) -> ExportReport:
    """Write `path/model.onnx` and, unless merged, one `NAME.onnx_adapter` per adapter; check them against PyTorch.

    An encoder-decoder model that generates becomes two graphs, `encoder.onnx` and `decoder.onnx`.

    Args:
        model: a model with adapters. It is exported in evaluation mode.
        path: a folder that is new, empty, or an earlier export; an earlier export is replaced as a whole.
        merged: fold the active adapters into the weights; the graph is then the base model's graph with other values.
            Otherwise the base model's graph gets a slot at every adapted weight, for adapters of any rank.
        adapters: names of the adapters to write; default: all. `merged` folds the active adapters and takes no names.
        inputs: a sample call; default: made from the model's config. Batch size (axis 0) and lengths (axis 1 of 2-D
            integer inputs) become dynamic; in the sample they must be unequal and at least 2.
        cache: for a model that generates text, make the KV cache an input (`past_key_values.0.key`) and an output
            (`present.0.key`), so that one graph serves the prompt and every later token.
        per_row: gate every slot, so that each row of a batch can have its own adapter or blend (`Session.use`).
        share: compute one product with A for all slots that read the same activation. The default is one slot per weight,
            with the names and shapes of `olive convert-adapters`. Sharing saves launches, but each B has zeros in the
            rows of the other sites.
        compact: make the method's own tensors graph inputs instead of a LoRA A/B pair: kilobytes for VeRA, RLoRA, MELoRA
            or a compacted B-LoRA, whose integers stay integers. All adapters must then share one method and seed.
        quantize: "int4" (weights in blocks of 32) or "int8" for the base's matrices. Adapters stay in float and read
            activations that were not rounded. The float graph is verified first; then the quantized graph, as users run
            it, is compared with the same rounded weights in float.
        accuracy_level: ONNX Runtime's setting for int4 products: 4 rounds activations to 8 bits per block and decodes about
            twice as fast; 0 does not round them. int8 always rounds activations dynamically.
        tokenizer: a transformers tokenizer, saved beside the graph for `graphpeft run` and onnxruntime-genai.
        opset: 18 or later; default: 23, which makes decoders faster. Use a lower one for older runtimes; the report
            names the oldest ONNX Runtime it was tried with.
        verify: `off` checks the graph's structure only. `fast` also compares ONNX Runtime with PyTorch at sizes that were
            not traced. `full` also checks each slot alone, swaps on one session, and that each adapter changes the output.
        rows: the former name of `per_row`.

    Returns:
        A report with the figure of every check; it is also saved as `path/graphpeft.json`.

    Raises:
        ExportError: the model cannot be exported, or a check failed.
        AdapterError: the model has no such adapters, or cannot be merged.

    After an error the folder is as it was before.
    """
    start = time.perf_counter()
    if rows is not None:
        warnings.warn("gp.export(rows=...) is called per_row=... now.", DeprecationWarning, stacklevel=2)
        per_row = rows
    opset = onnx.DEFAULT_OPSET if opset is None else opset
    check_options(verify, quantize, accuracy_level, compact, per_row, merged)
    chosen = exported_names(model, merged, adapters)
    refuse_inexportable(model)
    with inference_view(model), as_called(), _restored(model), staged(Path(path)) as folder:
        limit = parity.tolerance(model)
        pieces = [GraphExport(name, flat, folder, limit) for name, flat in parts(model, inputs, cached=cache)]
        if cache and getattr(model, "can_generate", lambda: False)() and not pieces[-1].flat.cache:
            pieces[-1].notes.append(
                "the KV cache is not among the inputs: the model keeps another kind of cache, or the sample has other inputs"
            )
        work = Work(model, pieces, folder, opset, verify, chosen, share and not compact, per_row,
                       as_trained if compact else as_pairs, _folded)  # fmt: skip
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
            passes=pieces[0].passes,
        )
        report.save(folder)
    return report


@contextmanager
def _folded(model: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    merge(model, names)
    try:
        yield
    finally:
        unmerge(model)


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Undo a merge within this context; afterwards merge again and restore every `requires_grad`."""
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
