"""What torch lets a caller set around a call: inference mode, gradients off, autocast, another default dtype or device.

None of it may change which sites are found or which numbers an adapter has. Whether a weight feeds the queries is asked of
autograd, which is silent in inference mode; what is drawn in the default dtype is another draw in another one; and factors
multiplied under autocast are rounded to half precision.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from threading import RLock

import torch

Defaults = tuple[torch.dtype, torch.device]
"""What new tensors are where nothing else is said."""
TORCHS: Defaults = torch.float32, torch.device("cpu")

_callers: ContextVar[Defaults] = ContextVar("callers")
_one_at_a_time = RLock()
"""The default dtype is the process's: what one thread sets for a while, another would take for the caller's."""


def _forked() -> None:
    """In a forked process nobody holds the lock any more, for the thread that did has stayed behind."""
    global _one_at_a_time
    _one_at_a_time = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


@contextmanager
def plain() -> Iterator[None]:
    """torch's settings as a new process has them, for a while. As a decorator, `@plain()`, for a whole function."""
    with _one_at_a_time, ExitStack() as stack:
        token = _callers.set(callers())
        try:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            accelerator = torch.accelerator.current_accelerator()
            for kind in {"cpu", accelerator.type if accelerator is not None else "cpu"}:
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            stack.enter_context(_defaults(TORCHS))
            yield
        finally:
            _callers.reset(token)


@contextmanager
def as_called() -> Iterator[None]:
    """Inside of `plain`, the caller's own defaults, for the model's code: it may be written for them."""
    with _defaults(callers()):
        yield


def callers() -> Defaults:
    """The defaults outside of `plain`, or the present ones."""
    return _callers.get((torch.get_default_dtype(), torch.get_default_device()))


@contextmanager
def _defaults(wanted: Defaults) -> Iterator[None]:
    dtype, device = wanted
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # A device of its own is a mode, through which every call into torch goes: only where it changes something.
        with device if device != torch.get_default_device() else ExitStack():
            yield
    finally:
        torch.set_default_dtype(before)
