"""What is not in tensors, compared when a state dict is loaded: methods, scales and seeds.

The tensors of another scale or another seed have the same names and shapes, so that loading them gives other numbers without a
word. `state_dict` therefore carries a description in its metadata, which `load_state_dict` compares first. Files that hold
tensors alone, such as safetensors, have no metadata; there only shapes can tell.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from graphpeft.chain import Chain
from graphpeft.errors import AdapterError
from graphpeft.rewrite.state import AdapterSet, chains, find_state

KEY = "graphpeft"
"""The name of the description in the root's metadata."""

Description = dict[str, dict[str, str]]
"""By adapter and site, what its numbers depend on."""


def describe(model: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Hook of the root's `state_dict`."""
    record = find_state(model)
    if record is not None and record.merge is None:
        metadata[KEY] = {name: _described(model, record, name) for name in record.adapters}


def compare(model: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any) -> None:
    """Hook of the root's `load_state_dict`. Raises `AdapterError` before anything is loaded."""
    record = find_state(model)
    if record is None or record.merge is not None:
        return
    given: Description = metadata.get(KEY, {})
    for name in given.keys() & record.adapters.keys():
        mine = _described(model, record, name)
        for site in given[name].keys() & mine.keys():
            if given[name][site] != mine[site]:
                raise AdapterError(
                    f"The state dict has other numbers of adapter {name!r} at {site} than its tensors show: it was saved with "
                    f"{given[name][site]}, and the model has {mine[site]}. Nothing was loaded. Apply the same rules with the "
                    f"same seed, or use gp.save and gp.load, which keep both."
                )


def _described(model: nn.Module, record: AdapterSet, name: str) -> dict[str, str]:
    adapter, found = record.adapters[name], chains(model, name)
    told = {}
    for entry in adapter.entries:
        chain, method = found[entry.site], entry.method
        if getattr(method, "dropout", 0):
            method = replace(method, dropout=0.0)  # type: ignore[call-arg]
        seed = f", seed {adapter.seed}" if _draws(chain) else ""
        told[entry.site.key] = f"{method} at scale {chain.scale:g}{seed}"
    return told


def _draws(chain: Chain) -> bool:
    """Whether tensors of the chain come from the seed alone, and are in no state dict."""
    kept = chain.state_dict()
    return any(name not in kept and tensor.is_floating_point() for name, tensor in chain.named_buffers())
