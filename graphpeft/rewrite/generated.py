"""Python functions compiled from FX graphs.

`fx.GraphModule` keeps the source of every graph that it ever compiled. A model that switches adapters would grow
without bound, so here the source text, which tracebacks show, is dropped together with its function.
"""

from __future__ import annotations

import linecache
import weakref
from collections.abc import Callable
from itertools import count
from typing import Any

from torch import fx

_numbers = count()


def compiled(graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a function whose first argument is the module that holds its tensors."""
    code = graph.python_code("self")
    filename = f"<graphpeft {next(_numbers)}>"
    scope = dict(code.globals)
    exec(compile(code.src, filename, "exec", dont_inherit=True), scope)
    function: Callable[..., Any] = scope.pop("forward")
    linecache.cache[filename] = len(code.src), None, code.src.splitlines(keepends=True), filename
    weakref.finalize(function, linecache.cache.pop, filename, None)
    return function
