"""`Program`: a model captured as an FX graph, and what the matcher needs to know about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn


@dataclass
class Program:
    """A model captured as a normalized FX graph of ATen operators, with what the matcher needs to know about it."""

    graph: fx.Graph
    model: nn.Module
    """The live model that the weights' names refer to."""
    weights: Mapping[fx.Node, str]
    """Parameter nodes and the qualified names of their parameters."""
    constants: Mapping[fx.Node, torch.Tensor]
    """Nodes of buffers and lifted constants with their real values (on the meta device, without values)."""
    whole: bool
    """Whether the graph itself is rewritten (`GraphModule`, `ExportedProgram`) instead of owner modules."""
