"""From what users hold (`nn.Module`, `GraphModule`, `ExportedProgram`) to a `Program`.

An `nn.Module` is captured for analysis only: its graph says where the queries are, the module itself is rewritten
at its owners. A graph of ATen operators is analyzed and rewritten as it is.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from graphpeft.errors import CaptureError
from graphpeft.meta import with_shapes
from graphpeft.owner import evaluating
from graphpeft.program import Program, stored
from graphpeft.samples import sample_inputs, without_cache

Inputs = torch.Tensor | Sequence[Any] | Mapping[str, Any] | None
"""An example call: one tensor, positional arguments, or keyword arguments; `None` makes one from the config."""


def capture(model: nn.Module | ExportedProgram, inputs: Inputs = None) -> Program:
    """Capture a model as a graph of ATen operators, with no change to the model.

    A model on the meta device is captured too; no weights are needed. Raises `CaptureError`, naming the last line
    of the model's code that was reached, when `torch.export` cannot trace it.
    """
    if isinstance(model, ExportedProgram):
        model = as_module(model)
    if isinstance(model, fx.GraphModule) and is_aten(model.graph):
        return _whole(model)
    args, kwargs = example_call(model, inputs)
    with quiet(model), with_shapes(model) as fitting:
        try:
            exported = torch.export.export(model, *fitting((args, kwargs)), strict=False)
        except Exception as error:
            raise CaptureError(_explain(model, error, inputs is None)) from error
    return _lifted(model, exported)


def as_module(program: ExportedProgram) -> fx.GraphModule:
    """The program as a module that trains: parameters under their own names, no guard call, train and eval allowed."""
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


def is_aten(graph: fx.Graph) -> bool:
    """Whether the graph consists of ATen operators, as `torch.export` makes them, and calls no modules of its own."""
    calls = [n for n in graph.nodes if n.op in {"call_function", "call_method", "call_module"}]
    plain = all(n.op == "call_function" or n.target == "_guards_fn" or "val" in n.meta for n in calls)
    return plain and any(isinstance(n.target, torch._ops.OpOverload) for n in calls)


def example_call(model: nn.Module, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`inputs` as (args, kwargs), with the key-value cache off."""
    if inputs is None:
        return (), without_cache(model, sample_inputs(model))
    if isinstance(inputs, Mapping):
        return (), without_cache(model, dict(inputs))
    return (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs), without_cache(model, {})


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """The model as a plain function: eval mode, no gradients, none of torch's fused encoder layers. Restored after."""
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


def _lifted(model: nn.Module, exported: ExportedProgram) -> Program:
    """A program from `torch.export`, whose parameters and constants are placeholders."""
    signature = exported.graph_signature
    first = {id(p): name for name, p in model.named_parameters()}
    nodes = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    # Tied weights have several names; the first is the one that `named_parameters` gives.
    weights = {nodes[arg]: first[id(stored(model, name))] for arg, name in signature.inputs_to_parameters.items()}
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


def _explain(model: nn.Module, error: Exception, guessed: bool) -> str:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    place, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "/torch/" not in file and not file.endswith("graphpeft/capture.py"):
            place = f"{file.rpartition('/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    remedy = (
        "The inputs were made from the config; pass inputs={...} with a call that works"
        if guessed
        else "Check that model(**inputs) runs, with a batch and lengths of at least 2"
    )
    return (
        f"{type(model).__name__} cannot be captured: {type(error).__name__} at {place or 'an unknown place'}: {reason.strip()}. "
        f"Usually the model branches on the values of a tensor, or the inputs do not fit. {remedy}."
    )
