"""Modules that wrap a whole model: torch.compile's, data parallel ones, and PEFT's."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

COMPILED = "_orig_mod"
"""Where the module that `torch.compile` returns keeps the model; private to torch."""


def inner(model: nn.Module) -> nn.Module | None:
    """The model in a wrapper, `None` if the module is none."""
    found: Any = None
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        found = model.module
    elif COMPILED in model._modules:
        found = model._modules[COMPILED]
    return found


def is_peft(model: nn.Module) -> bool:
    """Whether PEFT's adapters are in this model. Does not import peft."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)
