"""Adapter slots in PyTorch: a model that is open for an adapter while it is traced, and what is put into its slots.

Any method fits, as an exact LoRA pair of each weight.
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
from graphpeft.rewrite.owner import relower, vacate
from graphpeft.rewrite.state import inactive
from graphpeft.runtime.layout import Slot

GUEST = "0"
"""Name that slots go by on their owners: no adapter of a user can have it."""


def slot_at(site: Site, rank: str) -> Slot:
    """The slot of a site's whole weight, whichever rows the site has."""
    return Slot(site.inputs, ((named(site.weight), site.full or site.outputs),), rank)


def named(weight: str) -> str:
    """A weight as slots name it."""
    return weight.removesuffix(".weight")


class SlotBranch(nn.Module):
    """A slot while PyTorch traces it, in operators that ONNX Runtime fuses best: plain matmuls and a sum."""

    def __init__(self, slot: Slot, like: Tensor) -> None:
        super().__init__()
        (outputs,) = dict(slot.members).values()
        # Rank 2 stands for any rank: torch.export would take a size of 0 or 1 for a constant.
        self.A = nn.Parameter(like.new_zeros(slot.inputs, 2), requires_grad=False)
        self.B = nn.Parameter(like.new_zeros(2, outputs), requires_grad=False)

    def accumulate(self, y: Tensor, x: Tensor) -> Tensor:
        """y + (x @ A) @ B."""
        return y + (x @ self.A) @ self.B

    def add_rows(self, y: Tensor, ids: Tensor, padding_idx: int | None = None) -> Tensor:
        """Raises `ExportError`: a table's rows are picked, not multiplied by what the slot is fed."""
        raise ExportError("an adapted weight is also an embedding table, which has no slot; export with merged=True.")

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """The weight update (out, in), whatever the weight."""
        return (self.A @ self.B).t()


@contextmanager
def inserted(model: nn.Module, branches: Mapping[Site, nn.Module]) -> Iterator[None]:
    """Run the model with these branches, and no adapter, for a while; a site stands for all rows of its weight."""
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


def lora_pairs(chains: Mapping[Site, Chain]) -> dict[str, tuple[Tensor, Tensor]]:
    """An adapter as one exact LoRA pair by weight: A (in, rank) and B (rank, out), the scale in B.

    Pairs of several sites in one fused weight are put side by side; each has zeros where it has no output.

    Raises:
        ExportError: a chain has no inner width to be cut at, or its weight is no plain matrix.
    """
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for site, chain in chains.items():
        kind = "a stack of matrices" if site.stack else "an embedding table" if site.role == "embed" else ""
        if kind or site.tied:
            raise ExportError(
                f"{site.weight} is {kind or 'a tied weight'}, and a slot serves one matrix that activations meet in one "
                f"place. Export it folded in, with merged=True, or leave this adapter out with adapters=."
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
    """SHA-256, in hex, of the base model's tensors with their names, shapes and dtypes, whatever adapters it has."""
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
    relower(owner)


def _clear(owner: nn.Module) -> None:
    adapters = home(owner)
    if adapters is None or GUEST not in adapters.sites:
        return
    adapters.drop(GUEST)
    if adapters.sites:
        relower(owner)
    else:
        vacate(owner)
