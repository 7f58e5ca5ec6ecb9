"""A model that runs in another thread while its adapters are switched."""

from __future__ import annotations

import sys
import threading
from types import FrameType

from torch import nn

from graphpeft.errors import AdapterError


def refuse_running(model: nn.Module) -> None:
    """Raise `AdapterError` if a method of the model runs in another thread, such as `forward` or `generate`: it would compute one
    part with the old adapters and another with the new ones. Told from the stacks, so that a forward pass pays nothing."""
    if threading.active_count() < 2:
        return
    mine = threading.get_ident()
    for ident, top in sys._current_frames().items():
        frame: FrameType | None = top if ident != mine else None
        while frame is not None:
            if "self" in frame.f_code.co_varnames[:1] and frame.f_locals.get("self") is model:
                raise AdapterError(
                    f"{type(model).__name__} is running in another thread ({frame.f_code.co_name}), which would go on with other "
                    f"adapters. Switch when it is done, or use gp.per_row or a copy of the model for each thread."
                )
            frame = frame.f_back
