"""Kinds of owner: how the code of a module comes to run its adapters.

- *layer*: a plain projection or lookup. Its code is one operator, so it is traced once and rewritten as a graph.
- *graph*: a `GraphModule`, rewritten as the whole graph that it is.
- *code*: any other Python. It runs as it is, and reads adapted weights (see `weight_form`): its branches on arguments, on
  `self.training` and on attributes stay alive, which tracing cannot promise.
"""

from __future__ import annotations

from typing import Literal

from torch import fx, nn

from graphpeft.compat.accelerate import has_instance_forward
from graphpeft.compat.quantized import packed

Kind = Literal["layer", "graph", "code"]

PLAIN = {
    ("torch.nn.modules.linear", "Linear.forward"),
    ("torch.nn.modules.sparse", "Embedding.forward"),
    ("transformers.pytorch_utils", "Conv1D.forward"),
}
"""Where the code of plain layers stands. It reads nothing that changes but its tensors."""


def kind_of(owner: nn.Module) -> Kind:
    """The kind of a module that has its own class: not one with adapters running."""
    if isinstance(owner, fx.GraphModule):
        return "graph"
    if has_instance_forward(owner):
        return "code"
    code = type(owner).forward
    plain = (getattr(code, "__module__", ""), getattr(code, "__qualname__", "")) in PLAIN
    return "layer" if plain or packed(owner) else "code"
