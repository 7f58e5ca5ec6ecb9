"""Compares what the matcher found with the answers that people gave: per role, what it missed and what it got wrong."""

from __future__ import annotations

from dataclasses import dataclass, field

from answers import answers
from torch import nn

from graphpeft.match.find import SearchResult

JUDGED = ("q", "k", "v", "o", "gate", "up", "down", "experts.gate", "experts.up", "experts.down", "router", "latent")
ATTENTION, MLP = ("q", "k", "v"), ("gate", "up", "down")


@dataclass
class Verdict:
    missed: dict[str, list[str]] = field(default_factory=dict)
    """Per role, weights that play it and were not found, among those that the captured calls use."""
    wrong: dict[str, list[str]] = field(default_factory=dict)
    """Per role, weights that were found and do not play it."""
    expected: dict[str, int] = field(default_factory=dict)


def judge(model: nn.Module, found: SearchResult) -> Verdict:
    """The verdict on one model."""
    first = {id(p): n for n, p in model.named_parameters()}
    canonical = {n: first[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
    reached = {canonical[n] for n in found.reached}
    told = answers(model)
    constant = {canonical[n] for n in told.get("constant", ())}
    verdict = Verdict()
    for role in JUDGED:
        should = {canonical[n] for n in told.get(role, ())} & reached
        does = {canonical[s.weight] for s in found.sites if s.role == role}
        verdict.expected[role] = len(should)
        if should - does:
            verdict.missed[role] = sorted(should - does)
        # A part is captured by itself with queries for input, which are a parameter in the whole model.
        if does - should - constant:
            verdict.wrong[role] = sorted(does - should - constant)
    return verdict
