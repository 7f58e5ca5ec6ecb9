"""`fx.GraphModule`, whose graph's setter compiles into the module's class, and whose copies drop attributes."""

from __future__ import annotations

import copy
import weakref
from functools import partial

from torch import fx


def put_graph(module: fx.GraphModule, graph: fx.Graph) -> None:
    """Make `graph` the module's graph without compiling it."""
    module.__dict__["_graph"] = graph
    graph.owning_module = module


def carry(module: fx.GraphModule, attribute: str, wanted: bool) -> None:
    """Let copies of the module have a copy of this attribute, or no longer: `GraphModule.__deepcopy__` drops what it does not
    know."""
    hooks = module.__dict__.setdefault("_deepcopy_hooks", [])
    hooks[:] = [hook for hook in hooks if not (isinstance(hook, partial) and hook.func is _carried)]
    if wanted:
        hooks.append(partial(_carried, weakref.ref(module), attribute))


def _carried(original: weakref.ref[fx.GraphModule], attribute: str, clone: fx.GraphModule) -> None:
    source = original()
    if source is not None and attribute in source.__dict__:
        clone.__dict__[attribute] = copy.deepcopy(source.__dict__[attribute], {id(source): clone})
    carry(clone, attribute, wanted=True)
