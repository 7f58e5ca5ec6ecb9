"""Settings that a caller may have active: inference mode, no_grad, autocast, another default dtype or device.

None of them may change which sites are found or which numbers an adapter gets. The matcher asks autograd whether a
weight feeds the queries, and autograd records nothing in inference mode; random draws differ between default dtypes;
and autocast rounds products of factors to half precision.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from threading import RLock

import torch

Defaults = tuple[torch.dtype, torch.device]
"""dtype and device of new tensors where the code specifies none."""
TORCHS: Defaults = torch.float32, torch.device("cpu")

_callers: ContextVar[Defaults] = ContextVar("callers")
_one_at_a_time = RLock()
"""The default dtype is global to the process: another thread could mistake a temporary value for the caller's own."""


def _forked() -> None:
    """Replace the lock in a forked child: the thread that held it exists only in the parent."""
    global _one_at_a_time
    _one_at_a_time = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Other threads wait at the entry of this context and of `plain` until this one is done."""
    with _one_at_a_time:
        yield


@contextmanager
def plain() -> Iterator[None]:
    """Use the settings of a new process inside the context. As a decorator, `@plain()`, inside a whole function."""
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
    """Inside `plain`, restore the caller's own defaults for the model's code, which may depend on them."""
    with _defaults(callers()):
        yield


def callers() -> Defaults:
    """The defaults outside `plain`; without an enclosing `plain`, the current ones."""
    return _callers.get((torch.get_default_dtype(), torch.get_default_device()))


@contextmanager
def _defaults(wanted: Defaults) -> Iterator[None]:
    dtype, device = wanted
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # A default device is a mode that intercepts every call into torch: enter it only where it changes something.
        with device if device != torch.get_default_device() else ExitStack():
            yield
    finally:
        torch.set_default_dtype(before)
