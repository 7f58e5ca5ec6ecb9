"""The graph of an `fx.GraphModule`. Its setter compiles the graph into the module's class; here the class stays."""

from __future__ import annotations

from torch import fx


def put_graph(module: fx.GraphModule, graph: fx.Graph) -> None:
    """Make `graph` the module's graph without compiling it."""
    module.__dict__["_graph"] = graph
    graph.owning_module = module
