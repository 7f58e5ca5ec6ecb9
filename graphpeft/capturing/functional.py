"""Functional: no node of a capture changes a tensor that another node reads.

Code such as `k = x.new_empty(...); k[..., :n] = a; k[..., n:] = b` hides where `k` comes from: its readers would read
what `new_empty` returned. Rewritten, they read what the last write made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram


def functional(program: ExportedProgram) -> ExportedProgram:
    """The same program with writes through views turned into values; itself if there are none. Operators stay whole."""
    return program.run_decompositions(_WITHOUT_COPY) if any(map(_writes, program.graph.nodes)) else program


def _copied(destination: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """What `copy` returns, in operators that autograd knows: the probe for fused columns differentiates the graph."""
    return source.to(destination.dtype).expand(destination.shape)


_WITHOUT_COPY: dict[torch._ops.OperatorBase, Callable[..., Any]] = {torch.ops.aten.copy.default: _copied}


def _writes(node: fx.Node) -> bool:
    """Whether the node changes what others see; an activation in place whose input nobody else reads does not."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return False
    return torch.Tag.pointwise not in node.target.tags or any(len(a.users) > 1 for a in node.all_input_nodes[:1])
