"""Models without weights, for capture: parameters on the meta device stand in as fake CPU tensors.

Captured as they are, such models would lose values that their code makes itself: an index such as `x[..., [-2], :]`
is created on the device of `x`, and a tensor on the meta device holds nothing. Beside a fake CPU tensor it is real.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only


@contextmanager
def with_shapes(model: nn.Module) -> Iterator[Callable[[Any], Any]]:
    """Replace the model's meta tensors for a while; yields what makes example inputs fit them."""
    stores: list[dict[str, Any]] = [s for m in model.modules() for s in (m._parameters, m._buffers, m.__dict__)]
    held = [(s, n, t) for s in stores for n, t in s.items() if isinstance(t, torch.Tensor) and t.is_meta]
    if not held:
        yield lambda example: example
        return
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty_like(tensor, device="cpu")

    made: dict[torch.Tensor, torch.Tensor] = {}  # tied tensors stay tied
    for _, _, tensor in held:
        if tensor not in made:
            like = fake(tensor)
            made[tensor] = nn.Parameter(like, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else like
    try:
        for store, name, tensor in held:
            store[name] = made[tensor]
        yield lambda example: tree_map_only(torch.Tensor, fake, example)
    finally:
        for store, name, tensor in held:
            store[name] = tensor
