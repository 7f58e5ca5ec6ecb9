"""`gp.to_networkx`: whatever holds a graph, as networkx knows it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.export import ExportedProgram

from graphpeft.capturing.capture import Inputs
from graphpeft.inspect import graph_files, onnx_network
from graphpeft.inspect.network import network
from graphpeft.inspect.rewrite import rewrite

if TYPE_CHECKING:
    from networkx import MultiDiGraph


def to_networkx(model: Any, inputs: Inputs = None, *, adapted: bool = True, values: bool = False) -> MultiDiGraph[str]:
    """A model's graph as a `networkx.MultiDiGraph`, its active adapters in it unless `adapted` is false.

    Args:
        model: a module or an exported program; what `graphpeft.export` wrote, as a folder, an `.onnx` file or an
            `onnx_ir.Model`; a `.json` file that `write_graph` wrote; or a graph of networkx, which is returned.
        inputs: an example call, if none can be made from the model's config and `apply` was given none.
        values: also note checksums of the weights, so that a comparison sees which have changed.

    Raises: `CaptureError`, `FileError`.
    """
    import networkx

    if isinstance(model, networkx.MultiDiGraph):
        return model
    if isinstance(model, (str, os.PathLike)):
        path = Path(model)
        return graph_files.read_graph(path) if path.suffix == ".json" else onnx_network.read(path, values)
    if not isinstance(model, (nn.Module, ExportedProgram)):
        return onnx_network.network(onnx_network.as_ir(model), values)
    return network(rewrite(model, inputs), adapted, values)
