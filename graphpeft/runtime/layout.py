"""The layout shared by graphs, adapter files and sessions: the slots of a graph, and the tensors that fill them.

An adapter is a pair of matrices for each site, A (in, rank) and B (rank, out) with the scale in B. A slot holds the pair
of one site, or the pairs of several sites that read the same activation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Pair = tuple[np.ndarray, np.ndarray]
Pairs = Mapping[str, Pair]
"""Pairs by site."""
Dim = int | str
Arrays = dict[str, np.ndarray]

ROW_WEIGHTS = "graphpeft.row_weights"
"""Input (rows, adapters): how much of each adapter every row of the batch gets."""


@dataclass(frozen=True)
class Slot:
    """Inputs A (inputs, rank) and, for each site, B (rank, outputs): every site gets y + (x @ A) @ B."""

    inputs: int
    members: tuple[tuple[str, int], ...]
    """Sites and their numbers of outputs. A site is a weight's qualified name, without a final `.weight`."""
    rank: str
    """Symbol of the rank. Every slot has its own; with a shared one ONNX Runtime would assume equal buffer sizes."""

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(site for site, _ in self.members)

    @property
    def label(self) -> str:
        """The site, or the common prefix of several sites and their own names: `layers.0.q_proj+k_proj`."""
        if len(self.members) == 1:
            return self.sites[0]
        parts = [site.split(".") for site in self.sites]
        depth = next((i for i, names in enumerate(zip(*parts, strict=False)) if len(set(names)) > 1), 0)
        return ".".join([*parts[0][:depth], "+".join(".".join(names[depth:]) for names in parts)])

    @property
    def a(self) -> str:
        return f"{self.label}.lora_A.weight"

    @property
    def segments(self) -> str:
        """In graphs with per-row gates: the input that says which adapter each unit of rank belongs to."""
        return f"{self.label}.lora_segments"

    @property
    def shapes(self) -> dict[str, tuple[Dim, ...]]:
        """Of each input, by name."""
        return {self.a: (self.inputs, self.rank)} | {b_of(site): (self.rank, n) for site, n in self.members}

    def filled(self, pairs: Pairs) -> Arrays:
        """The slot's inputs for an adapter's pairs, concatenated along the rank; empty if it has no pair here."""
        present = [(site, *pairs[site]) for site in self.sites if site in pairs]
        if not present:
            return {}
        tensors = {self.a: np.concatenate([a for _, a, _ in present], 1)}
        ranks = {site: a.shape[1] for site, a, _ in present}
        total, start = sum(ranks.values()), 0
        for site, outputs in self.members:
            b = np.zeros((total, outputs), tensors[self.a].dtype)
            if site in ranks:
                b[start : start + ranks[site]] = pairs[site][1]
                start += ranks[site]
            tensors[b_of(site)] = b
        return tensors

    def as_dict(self) -> dict[str, Any]:
        return {"inputs": self.inputs, "sites": dict(self.members), "rank": self.rank, "A": self.a}


@dataclass(frozen=True)
class NativeSlot:
    """Inputs for the tensors that a method trains at one site, in their own shapes. Zeros give a zero update."""

    site: str
    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def sites(self) -> tuple[str, ...]:
        return (self.site,)

    @property
    def label(self) -> str:
        return self.site

    @property
    def shapes(self) -> dict[str, tuple[Dim, ...]]:
        """Of each input, by name."""
        return dict(self.tensors)

    def as_dict(self) -> dict[str, Any]:
        return {"site": self.site, "tensors": {name: list(shape) for name, shape in self.tensors}}


AdapterInput = Slot | NativeSlot


def place(fields: Mapping[str, Any]) -> AdapterInput:
    """The inverse of `as_dict`."""
    if "tensors" in fields:
        return NativeSlot(fields["site"], tuple((name, tuple(shape)) for name, shape in fields["tensors"].items()))
    return Slot(fields["inputs"], tuple(fields["sites"].items()), fields["rank"])


def a_of(site: str) -> str:
    return f"{site}.lora_A.weight"


def b_of(site: str) -> str:
    return f"{site}.lora_B.weight"


def filled(slots: Iterable[AdapterInput], pairs: Pairs) -> Arrays:
    """The inputs of all slots for an adapter's pairs."""
    return {name: value for slot in pair_slots(slots) for name, value in slot.filled(pairs).items()}


def pair_slots(places: Iterable[AdapterInput]) -> list[Slot]:
    """The slots that take LoRA pairs."""
    return [place for place in places if isinstance(place, Slot)]


def unfilled(slots: Iterable[AdapterInput], tensors: Arrays) -> dict[str, Pair]:
    """The pairs in `tensors`, which are laid out for these slots or for one slot per site."""
    pairs: dict[str, Pair] = {}
    for slot in pair_slots(slots):
        for site in slot.sites:
            a = tensors.get(slot.a, tensors.get(a_of(site)))
            b = tensors.get(b_of(site))
            if a is not None and b is not None:
                pairs[site] = a, b
    return pairs


def blended(parts: Sequence[tuple[Pairs, float]]) -> dict[str, Pair]:
    """One adapter that is the sum of several, each times its strength."""
    sites = dict.fromkeys(site for pairs, _ in parts for site in pairs)
    made: dict[str, Pair] = {}
    for site in sites:
        here = [(*pairs[site], strength) for pairs, strength in parts if site in pairs]
        a = np.concatenate([a for a, _, _ in here], 1)
        b = np.concatenate([b * np.asarray(strength, b.dtype) for _, b, strength in here], 0)
        made[site] = a, b
    return made


def concat_adapters(slots: Iterable[AdapterInput], adapters: Sequence[Pairs]) -> Arrays:
    """Several adapters concatenated along the rank in every slot, with the segments that map rank units to adapters."""
    tensors: Arrays = {}
    for slot in pair_slots(slots):
        parts = [(number, slot.filled(pairs)) for number, pairs in enumerate(adapters)]
        parts = [(number, part) for number, part in parts if part]
        if not parts:
            continue
        for name in parts[0][1]:
            axis = 1 if name == slot.a else 0
            tensors[name] = np.concatenate([part[name] for _, part in parts], axis)
        tensors[slot.segments] = np.concatenate(
            [np.full(part[slot.a].shape[1], number, np.int64) for number, part in parts]
        )
    return tensors
