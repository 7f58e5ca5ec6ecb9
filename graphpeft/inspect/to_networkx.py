"""`gp.to_networkx`: convert anything that holds a graph to networkx."""

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
from graphpeft.rewrite.entry import entered

if TYPE_CHECKING:
    from networkx import MultiDiGraph


def to_networkx(model: Any, inputs: Inputs = None, *, adapted: bool = True, values: bool = False) -> MultiDiGraph[str]:
    """A model's graph as a `networkx.MultiDiGraph`, with its active adapters unless `adapted` is false.

    Args:
        model: a module or an exported program; an export as a folder, an `.onnx` file or an `onnx_ir.Model`; a `.json`
            file that `write_graph` wrote; or a networkx graph, which is returned as is.
        inputs: an example call; default: the one given to `apply`, or one made from the model's config.
        values: also record checksums of the weights, so that a comparison shows which ones changed.

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
    return network(rewrite(entered(model, "draw"), inputs), adapted, values)
