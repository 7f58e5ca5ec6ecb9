"""Capture a model (`nn.Module`, `GraphModule`, `ExportedProgram`) as a `Program`.

An `nn.Module` is captured for analysis only: the graph shows where the queries are, and the module itself is rewritten
at its owner modules. A graph of ATen operators is analyzed and rewritten directly.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from graphpeft.ambient import TORCHS, as_called, callers, plain
from graphpeft.capturing.blocks import Folding, kinds
from graphpeft.capturing.diagnose import explain
from graphpeft.capturing.expand_blocks import expand_blocks
from graphpeft.capturing.functional import functional
from graphpeft.capturing.samples import sample_inputs, without_cache
from graphpeft.compat import operators
from graphpeft.compat import transformers_export as hf
from graphpeft.compat.accelerate import unhooked
from graphpeft.compat.fake_tensors import with_shapes
from graphpeft.compat.quantized import in_floats
from graphpeft.errors import CaptureError
from graphpeft.ir.program import Program
from graphpeft.ir.weights import get_parameter
from graphpeft.rewrite.owner import evaluating
from graphpeft.tracing import as_pass

log = logging.getLogger(__name__)

Inputs = torch.Tensor | Sequence[Any] | Mapping[str, Any] | None
"""An example call: one tensor, positional arguments, or keyword arguments; `None` makes one from the config."""
Call = tuple[tuple[Any, ...], dict[str, Any]]


@as_pass("capture", "trace the model into a graph of ATen operators")
def capture(model: nn.Module | ExportedProgram, inputs: Inputs = None, *, blocks: bool = True) -> Program:
    """Capture a model as a graph of ATen operators, with no change to the model.

    A model on the meta device needs no weights. Of equal blocks, only the first and the last are traced; the others
    become copies of the first. With `blocks=False` each block is traced, which gives the same graph. Raises
    `CaptureError` when `torch.export` cannot trace the model; the message names the module, the line of its code, the
    cause and the remedy.
    """
    model = as_module(model)
    if isinstance(model, fx.GraphModule) and is_aten(model.graph):
        return _whole(model)
    with plain():
        try:
            return _captured(model, inputs, blocks)
        except CaptureError:
            if callers() == TORCHS:
                raise
            with contextlib.suppress(CaptureError), as_called():  # the model's code may depend on these defaults
                return _captured(model, inputs, blocks)
            raise


def _captured(model: nn.Module, inputs: Inputs, blocks: bool) -> Program:
    made_inside = next((name for name, p in model.named_parameters() if p.is_inference()), None)
    if made_inside is not None:
        raise CaptureError(
            f"{made_inside} of {type(model).__name__} was made inside of torch.inference_mode. A capture and training need "
            f"autograd, which refuses such tensors. Build or load the model outside; it may run inside."
        )
    with in_floats(model):
        try:
            example = example_call(model, inputs)
            with inference_view(model), unhooked(model), with_shapes(model) as fitting:
                exported = _export_any(model, example, fitting(example), blocks)
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(explain(model, error, inputs is None)) from error
        return _lifted(model, exported)


def _export_any(model: nn.Module, example: Call, fitting: Call, blocks: bool) -> ExportedProgram:
    """Export with `torch.export`; if that fails, with the exporter that transformers has for its own models."""
    try:
        with _silent():
            return _export(model, *fitting, blocks)
    except Exception:
        args, kwargs = example
        if args or not hf.known(model):
            raise
        with contextlib.suppress(Exception), _silent():  # the first error says more about the model
            return functional(hf.export(model, kwargs))  # it reads values, so pass the real tensors
        raise


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: bool) -> ExportedProgram:
    exact: frozenset[str] = frozenset()
    while blocks and (repeated := kinds(model, exact)):
        folding = Folding(model, repeated)
        try:
            with folding.folded():
                exported = functional(torch.export.export(model, args, kwargs, strict=False))
            if not folding.used:
                return expand_blocks(model, exported)
        except Exception as error:
            # Whatever the cause, the full capture below avoids it, or reports what is wrong with the model.
            log.debug("blocks not folded: %s: %s", type(error).__name__, error)
        if folding.used <= exact:
            break
        exact |= folding.used
    return functional(torch.export.export(model, args, kwargs, strict=False))


def as_module(model: nn.Module | ExportedProgram) -> nn.Module:
    """A module unchanged; a program as a trainable module: parameters under their own names, no guard call."""
    if not isinstance(model, ExportedProgram):
        return model
    module = model.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


def is_aten(graph: fx.Graph) -> bool:
    """Whether the graph consists of ATen operators, as `torch.export` makes them, and calls no submodules."""
    calls = [n for n in graph.nodes if n.op in {"call_function", "call_method", "call_module"}]
    plain = all(n.op == "call_function" or n.target == "_guards_fn" or "val" in n.meta for n in calls)
    return plain and any(operators.is_aten(n.target) for n in calls)


def example_call(model: nn.Module, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`inputs` as (args, kwargs), with the key-value cache off."""
    if inputs is None:
        return (), without_cache(model, sample_inputs(model))
    if isinstance(inputs, Mapping):
        return (), without_cache(model, dict(inputs))
    return (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs), without_cache(model, {})


@contextlib.contextmanager
def inference_view(model: nn.Module) -> Iterator[None]:
    """Run the model as a plain function: eval mode, no gradients, no fused encoder layers. Restored on exit."""
    training = {m: m.training for m in model.modules()}
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for module in training:
        module.training = False
    try:
        with torch.no_grad(), evaluating(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, mode in training.items():
            module.training = mode


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Suppress what torch logs and prints before it raises, traces and graphs: the `CaptureError` suffices."""
    loggers = [v for k, v in logging.root.manager.loggerDict.items() if f"{k}.".startswith("torch.")]
    handlers = {h for v in loggers if isinstance(v, logging.Logger) and v.name != "torch.__trace" for h in v.handlers}
    printed = io.StringIO()

    def not_torchs(record: logging.LogRecord) -> bool:
        return not f"{record.name}.".startswith("torch.")

    for handler in handlers:
        handler.addFilter(not_torchs)
    try:
        with contextlib.redirect_stderr(printed):
            yield
        sys.stderr.write(printed.getvalue())
    finally:
        for handler in handlers:
            handler.removeFilter(not_torchs)


def _lifted(model: nn.Module, exported: ExportedProgram) -> Program:
    """A program from `torch.export`, whose parameters and constants are placeholders."""
    signature = exported.graph_signature
    first = {id(p): name for name, p in model.named_parameters()}
    nodes = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    # Tied weights have several names; the first is the one that `named_parameters` gives.
    weights = {
        nodes[arg]: first[id(get_parameter(model, name))] for arg, name in signature.inputs_to_parameters.items()
    }
    constants: dict[fx.Node, torch.Tensor] = {}
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for arg, name in {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}.items():
        value = buffers.get(name, exported.constants.get(name))
        if isinstance(value, torch.Tensor):
            constants[nodes[arg]] = value
    return Program(exported.graph, model, weights, constants, whole=False)


def _whole(module: fx.GraphModule) -> Program:
    """A program from a graph module, whose parameters and constants are `get_attr` nodes; its graph is a copy."""
    graph = copy.deepcopy(module.graph)
    first = {id(p): name for name, p in module.named_parameters()}
    weights: dict[fx.Node, str] = {}
    constants: dict[fx.Node, torch.Tensor] = {}
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        value: Any = module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, nn.Parameter):
            weights[node] = first[id(value)]
        elif isinstance(value, torch.Tensor):
            constants[node] = value
    calls = [n for n in graph.nodes if n.op == "call_function"]
    if sum("val" not in n.meta for n in calls) > len(calls) // 2:
        raise CaptureError(
            "This GraphModule carries no shapes (node.meta['val']). Usually it was made by make_fx or by hand. "
            "Capture the original model with torch.export.export(model, ...), and pass the exported program."
        )
    return Program(graph, module, weights, constants, whole=True)
