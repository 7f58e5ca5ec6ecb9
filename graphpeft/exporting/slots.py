"""Adapter slots in PyTorch: empty A/B pairs in a model while it is traced, and the LoRA pairs that fill them.

A slot takes any method that equals a LoRA pair exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from graphpeft.chain import Chain
from graphpeft.errors import AdapterError, ExportError
from graphpeft.ir.site import Site
from graphpeft.rewrite.adapters import Adapters, home, settle
from graphpeft.rewrite.owner import install
from graphpeft.rewrite.sync import inactive, sync
from graphpeft.runtime.layout import Slot

GUEST = "0"
"""Adapter name of slots on their owners. Users' adapters cannot have it."""


def slot_at(site: Site, rank: str) -> Slot:
    """The slot for a site's whole weight, even if the site is only some of its rows."""
    return Slot(site.inputs, ((named(site.weight), site.full or site.outputs),), rank)


def named(weight: str) -> str:
    """A weight's name in slots."""
    return weight.removesuffix(".weight")


class SlotBranch(nn.Module):
    """A slot during tracing, in the operators that ONNX Runtime fuses best: plain matmuls and a sum."""

    def __init__(self, slot: Slot, like: Tensor) -> None:
        super().__init__()
        (outputs,) = dict(slot.members).values()
        # Rank 2 stands for any rank: torch.export specializes sizes 0 and 1 to constants.
        self.A = nn.Parameter(like.new_zeros(slot.inputs, 2), requires_grad=False)
        self.B = nn.Parameter(like.new_zeros(2, outputs), requires_grad=False)

    def accumulate(self, y: Tensor, x: Tensor) -> Tensor:
        """y + (x @ A) @ B."""
        return y + (x @ self.A) @ self.B

    def add_rows(self, y: Tensor, ids: Tensor, padding_idx: int | None = None) -> Tensor:
        """Raises `ExportError`: a lookup picks rows of a table, and a slot only adds matrix products."""
        raise ExportError("an adapted weight is also an embedding table, which has no slot; export with merged=True.")

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """The weight update (out, in), which does not depend on the weight."""
        return (self.A @ self.B).t()


@contextmanager
def inserted(model: nn.Module, branches: Mapping[Site, nn.Module]) -> Iterator[None]:
    """Within this context the model runs these branches and no adapters; each branch acts on all rows of its weight."""
    paths = dict.fromkeys(site.owner for site in branches)
    with inactive(model):
        try:
            for site, branch in branches.items():
                whole = replace(site, rows=None, shape=(site.full or site.outputs, site.inputs), role="slot")
                settle(model.get_submodule(site.owner), site.owner).add(GUEST, whole, branch)
            for path in paths:
                _show(model.get_submodule(path))
            yield
        finally:
            for path in paths:
                _clear(model.get_submodule(path))
            sync(model)


def lora_pairs(chains: Mapping[Site, Chain]) -> dict[str, tuple[Tensor, Tensor]]:
    """An adapter as one exact LoRA pair per weight: A (in, rank) and B (rank, out), with the scale in B.

    The pairs of several sites in one fused weight are concatenated; each is zero outside of its own outputs.

    Raises:
        ExportError: an update has no low-rank factorization, or its weight is not a plain matrix.
    """
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for site, chain in chains.items():
        kind = "a stack of matrices" if site.stack else "an embedding table" if site.role == "embed" else ""
        if kind or site.tied:
            raise ExportError(
                f"{site.weight} is {kind or 'a tied weight'}, and a slot works only for a single matrix that multiplies "
                f"activations in one place. Export with merged=True, or leave this adapter out with adapters=."
            )
        try:
            with chain.settled():
                down, up = chain.to_lora()
        except AdapterError as error:
            raise ExportError(f"{site.weight}: {error} It can be exported with merged=True.") from error
        a, b = down.t(), up.t()
        if site.weight in pairs:
            before = pairs[site.weight]
            a, b = torch.cat([before[0], a], 1), torch.cat([before[1], b], 0)
        pairs[site.weight] = a, b
    return pairs


def fingerprint(model: nn.Module) -> str:
    """SHA-256, in hex, of the base model's tensors with names, shapes and dtypes; adapters do not affect it."""
    ours = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, Adapters))
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not name.startswith(ours):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _show(owner: nn.Module) -> None:
    adapters = home(owner)
    assert adapters is not None
    adapters.active = (GUEST,)
    install(owner)


def _clear(owner: nn.Module) -> None:
    adapters = home(owner)
    if adapters is not None and GUEST in adapters.sites:
        adapters.drop(GUEST)
