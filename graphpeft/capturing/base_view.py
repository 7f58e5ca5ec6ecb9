"""A temporary view of the base model, for analysis."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from graphpeft.capturing.samples import analysis_config
from graphpeft.compat.quantized import in_floats
from graphpeft.rewrite.state import find_state
from graphpeft.rewrite.sync import inactive


@contextmanager
def base_view(model: nn.Module) -> Iterator[None]:
    """Show the base model: adapters are inactive and absent from the module tree, configs are set for a capture, and
    quantized weights appear with the shapes of their dequantized matrices."""
    with ExitStack() as stack:
        for root in [
            module for module in model.modules() if find_state(module) is not None
        ]:  # a part may be a root itself
            stack.enter_context(inactive(root, attached=False))
        stack.enter_context(analysis_config(model))
        stack.enter_context(in_floats(model))
        yield
