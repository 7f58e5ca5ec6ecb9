"""Convert an ONNX graph to networkx, with the attributes of `graph_model.Node`."""

from __future__ import annotations

import ast
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir

from graphpeft.errors import FileError
from graphpeft.exporting.onnx.tags import ADAPTER, SCOPES, SITE
from graphpeft.inspect.graph_model import Node
from graphpeft.ir.layers import layer_of_module

if TYPE_CHECKING:
    from networkx import MultiDiGraph

FEW = 64
"""An initializer with at most this many elements counts as a constant, such as a shape."""


def read(path: Path, values: bool = False) -> MultiDiGraph[str]:
    """The graph of an `.onnx` file, or the unconnected graphs of all files in a folder. Raises `FileError`."""
    import networkx

    paths = sorted(path.glob("*.onnx")) if path.is_dir() else [path]
    if not paths:
        raise FileError(f"{path} has no .onnx file. Pass a folder that gp.export wrote, or an .onnx file.")
    graph: MultiDiGraph[str] = networkx.MultiDiGraph(name=path.name)
    for each in paths:
        try:
            model = ir.load(each)
        except Exception as error:  # from the parser or the operating system
            raise FileError(
                f"{each} cannot be read as an ONNX graph: {error}. Check that it is a complete .onnx file."
            ) from error
        _add(graph, model, f"{each.stem}/" if len(paths) > 1 else "", values)
    return graph


def network(model: ir.Model, values: bool = False) -> MultiDiGraph[str]:
    import networkx

    graph: MultiDiGraph[str] = networkx.MultiDiGraph(name=model.graph.name or "")
    _add(graph, model, "", values)
    return graph


def as_ir(model: Any) -> ir.Model:
    """An ONNX model as `ir.Model`. Raises `FileError` for anything else."""
    if isinstance(model, ir.Model):
        return model
    if isinstance(model, onnx.ModelProto):
        return ir.serde.deserialize_model(model)
    raise FileError(
        f"A {type(model).__name__} has no graph to inspect. Pass a module, an exported program, an .onnx file, a folder that "
        f"gp.export wrote, a .json graph, or a networkx graph."
    )


def _add(graph: MultiDiGraph[str], model: ir.Model, prefix: str, values: bool) -> None:
    inside = model.graph
    for value in [*inside.inputs, *inside.initializers.values()]:
        if value.uses() and prefix + str(value.name) not in graph:
            graph.add_node(prefix + str(value.name), **_outside(value, value in inside.inputs, values))
    names: dict[ir.Value, str] = {}
    for number, node in enumerate(inside):
        name = prefix + (node.name or f"{node.op_type}_{number}")
        names |= dict.fromkeys(node.outputs, name)
        graph.add_node(name, **_node(node))
        for port, read in enumerate(node.inputs):
            if read is not None:
                source = names.get(read, prefix + str(read.name))
                graph.add_edge(source, name, key=str(port), port=str(port))
    for value in inside.outputs:
        name = f"{prefix}output {value.name}"
        graph.add_node(name, kind="output", op=str(value.name), arguments="%", **_shape(value))
        graph.add_edge(names.get(value, prefix + str(value.name)), name, key="0", port="0")


def _outside(value: ir.Value, given: bool, values: bool) -> Node:
    """The attributes of an input or initializer."""
    about: Node = {"kind": "input", "op": str(value.name), "arguments": "", **_shape(value)}
    if ".lora_" in str(value.name) and given:
        about["adapter"] = "slot"
        about["path"] = str(value.name).partition(".lora_")[0]
    elif value.const_value is not None and not given:
        about["numbers"] = value.const_value.size
        weight = about["numbers"] > FEW
        about["kind"] = "weight" if weight else "constant"
        if weight:
            about["weight"] = str(value.name)
        if values:
            about["values"] = zlib.crc32(value.const_value.tobytes())
    path = about.get("path", about.get("weight", "").rpartition(".")[0])
    if (layer := layer_of_module(path)) is not None:
        about |= {"path": path, "layer": layer}
    return about


def _node(node: ir.Node) -> Node:
    arguments = ["" if value is None else "%" for value in node.inputs]
    arguments += [f"{name}={_attribute(each)}" for name, each in sorted(node.attributes.items())]
    about: Node = {"kind": "op", "op": node.op_type, "arguments": ", ".join(arguments), **_shape(node.outputs[0])}
    props = node.metadata_props
    path = next(_scopes(props.get(SCOPES, "[]")), "")
    if SITE in props:
        path, about["weight"] = props[SITE], props[SITE]
        about["adapter"] = props[ADAPTER]
    if path:
        about["path"] = path
        if (layer := layer_of_module(path)) is not None:
            about["layer"] = layer
    return about


def _scopes(text: str) -> Iterator[str]:
    """The path of the module that a node was translated from, relative to the model inside the exported wrapper."""
    try:
        scopes = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return
    if len(scopes) > 2:
        yield str(scopes[-2]).removeprefix("model.")


def _attribute(given: ir.Attr) -> str:
    value = given.value
    return str(value.numpy().tolist()) if isinstance(value, ir.Tensor) else str(value)


def _shape(value: ir.Value) -> Node:
    about: Node = {}
    if value.shape is not None:
        dims = [str(dim if isinstance(dim, int) else dim.value or "?") for dim in value.shape]
        about["shape"] = " × ".join(dims)
    if value.dtype is not None:
        about["dtype"] = value.dtype.name.lower()
    return about
