"""Adapter slots on the PyTorch side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import Snapshot, randomize
from exports import CLOSE, FAR, SAMPLE, hand, tiny, unchanged
from zoo import torch_encoder

import graphpeft as gp
from graphpeft.chain import Chain, Dense, zeros
from graphpeft.errors import ExportError
from graphpeft.exporting.slots import SlotBranch, fingerprint, inserted, lora_pairs, slot_at
from graphpeft.rewrite.state import chains


@pytest.mark.parametrize(
    ("build", "rules", "name", "inputs"),
    [
        (lambda: tiny("hand"), "qkv:lora(r=3, alpha=6)", "x", SAMPLE["x"]),
        (lambda: tiny("gpt2"), "v:rlora(r=64); q:lora(r=2)", "input_ids", torch.arange(3, 13).view(2, 5)),
        (torch_encoder, "qk:lora; mlp:lora(r=2)", "src", SAMPLE["x"]),
    ],
    ids=["bare parameters", "fused and transposed", "weight form"],
)
def test_slots_filled_with_a_lowered_adapter_answer_as_it_does(
    build: Any, rules: str, name: str, inputs: torch.Tensor
) -> None:
    def answer() -> torch.Tensor:
        with torch.no_grad():
            found = model(inputs)
        return found if isinstance(found, torch.Tensor) else found.logits

    model = build().eval()
    base = answer()
    gp.apply(model, rules, inputs={name: inputs})
    randomize(model)
    want, before = answer(), Snapshot.of(model)
    assert (want - base).abs().max() > FAR
    pairs = lora_pairs(chains(model, "default"))
    branches = {}
    for site in {site.weight: site for site in chains(model, "default")}.values():
        branches[site] = branch = SlotBranch(slot_at(site, "rank"), inputs)
        branch.A.data, branch.B.data = pairs[site.weight]
    with inserted(model, branches):
        assert (answer() - want).abs().max() < CLOSE
        for branch in branches.values():
            branch.A.data, branch.B.data = branch.A[:, :0], branch.B[:0]
        assert (answer() - base).abs().max() < CLOSE
    assert torch.equal(answer(), want)
    assert unchanged(before, model)


def test_a_chain_without_an_inner_width_is_refused_by_site() -> None:
    site = next(iter(chains(hand(), "a")))
    with pytest.raises(ExportError, match=r"wq: .* no inner width.*merged=True"):
        lora_pairs({site: Chain([Dense(32, 32, zeros())])})


def test_fingerprint_is_of_the_base_alone() -> None:
    model, plain = hand("qv:lora", "k:lora"), tiny("hand")
    assert fingerprint(model) == fingerprint(plain)
    with torch.no_grad():
        plain.wq[0, 0] += 1e-6
    assert fingerprint(model) != fingerprint(plain)
