"""Make a captured program functional: no node changes a tensor that another node reads.

In code such as `k = x.new_empty(...); k[..., :n] = a; k[..., n:] = b`, readers of `k` appear to read the result of
`new_empty`, which hides where the values come from. After the rewrite they read the result of the last write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from graphpeft.compat.operators import OperatorBase, is_aten, is_mutable


def functional(program: ExportedProgram) -> ExportedProgram:
    """The same program, with writes through views turned into values if it has any. Other operators remain."""
    return program.run_decompositions(_WITHOUT_COPY) if any(map(_writes, program.graph.nodes)) else program


def _copied(destination: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """The result of `copy`, in operators that autograd knows: the probe for fused columns differentiates the graph."""
    return source.to(destination.dtype).expand(destination.shape)


_WITHOUT_COPY: dict[OperatorBase, Callable[..., Any]] = {torch.ops.aten.copy.default: _copied}


def _writes(node: fx.Node) -> bool:
    """Whether the node changes what others read; an in-place activation that alone reads its input does not."""
    if not is_aten(node.target) or not is_mutable(node.target):
        return False
    return torch.Tag.pointwise not in node.target.tags or any(len(a.users) > 1 for a in node.all_input_nodes[:1])
