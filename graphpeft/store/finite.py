"""NaN and infinite values in an adapter's tensors, named where it is saved and loaded.

Only a warning: who looks for the cause needs the values. `gp.merge` and `gp.export` refuse such an adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from graphpeft.chain.quantizers import ActivationQuantizer
from graphpeft.planning.plan import Entry
from graphpeft.rewrite.state import saved

MOST = 3
"""How many tensors a warning lists."""


def odd_tensors(tensors: Mapping[str, torch.Tensor], entries: Iterable[Entry] = ()) -> list[str]:
    """The tensors with NaN or infinite values, except ranges of activations that no batch has set yet: these are NaN."""
    odd = [name for name, tensor in tensors.items() if not _finite(tensor)]
    unset = _unset(entries) if odd else set()
    return [name for name in odd if name not in unset]


def warn_of(odd: list[str], folder: Path, what: str, stacklevel: int) -> None:
    """Name tensors that are not finite; `what` says what became of them."""
    if odd:
        listed = ", ".join(odd[:MOST]) + (f" and {len(odd) - MOST} more" if len(odd) > MOST else "")
        warnings.warn(
            f"{folder}: NaN or infinite values in {listed}. Usually training diverged, or a value left the range of float16. "
            f"{what} Train again from an earlier save, with a smaller learning rate or in another dtype.",
            stacklevel=stacklevel + 1,
        )


def _finite(tensor: torch.Tensor) -> bool:
    if tensor.is_meta or not tensor.is_floating_point():
        return True
    wide = tensor if tensor.element_size() > 1 else tensor.float()  # torch has no isfinite for some kinds of float8
    return bool(wide.detach().isfinite().all())


def _unset(entries: Iterable[Entry]) -> set[str]:
    """The keys of ranges that the first batch of training sets."""
    found: set[str] = set()
    for entry in entries:
        with torch.device("meta"):
            chain = entry.build()
        ranges = [part.log_range for part in chain.modules() if isinstance(part, ActivationQuantizer)]
        found |= {key for key, tensor in saved(entry.site, chain) if any(tensor is each for each in ranges)}
    return found
