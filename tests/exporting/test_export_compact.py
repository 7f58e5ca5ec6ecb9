"""Exports that hold open what a method trains. The oracle is PyTorch, asked here again, past the exporter's own checks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checks import randomize
from exports import CLOSE, FAR, SAMPLE, hand, off, tiny

import graphpeft as gp
from graphpeft.errors import AdapterError, ExportError
from graphpeft.passes.export import export
from graphpeft.rewrite.state import chains
from graphpeft.runtime.adapter_file import read
from graphpeft.runtime.layout import NativeSlot
from graphpeft.runtime.session import Session

RULES = {
    "vera": "qv:vera(r=64)",
    "rlora": "qv:rlora(r=32)",
    "melora": "qv:melora(n=4, r=1)",
    "blora": "qv:blora(r=4)",
}


def answer(session: Session) -> np.ndarray:
    return session.run({"x": SAMPLE["x"].numpy()})["output"]


def with_bits(rule: str) -> torch.nn.Module:
    """Two adapters; those of B-LoRA with gates closed at 4 bits of B and A, and with one direction dropped."""
    model = tiny("hand")
    for seed, name in enumerate("ab"):
        gp.apply(model, rule, name=name, inputs=SAMPLE)
        randomize(model, name, seed=seed)
        if "blora" in rule:
            for chain in chains(model, name).values():
                for path, parameter in chain.named_parameters():
                    if path.endswith("logits") and parameter.numel() == 4:  # of 4, 8, 16, 32 bits
                        parameter.data = torch.tensor([9.0, -9.0, -9.0, -9.0])
                    elif path.endswith("log_range"):
                        parameter.data.fill_(1.0)
    return gp.compact(model) if "blora" in rule else model


@pytest.mark.parametrize("method", RULES)
def test_a_method_is_shipped_as_what_it_trains(method: str, tmp_path: Path) -> None:
    model = with_bits(RULES[method])
    with gp.disabled(model):
        want = {None: model(SAMPLE["x"]).detach().numpy()}
    for name in "ab":
        gp.activate(model, name)
        want[name] = model(SAMPLE["x"]).detach().numpy()
    export(model, tmp_path / "deploy", inputs=SAMPLE, compact=True, verify="off")
    session = Session(tmp_path / "deploy")
    assert all(isinstance(slot, NativeSlot) for slot in session.graphs["model"].slots)
    for name in (None, "a", "b", None, "a"):
        session.use(name)
        assert off(answer(session), want[name]) < CLOSE
    assert off(want["a"], want["b"]) > FAR
    tensors = read(tmp_path / "deploy" / "a.onnx_adapter")
    trained = [tensor for chain in chains(model, "a").values() for tensor in chain.state_dict().values()]
    assert sum(value.nbytes for value in tensors.values()) <= sum(t.numel() * t.element_size() for t in trained)
    if method == "blora":  # integers stay integers
        assert any(value.dtype == np.int8 for value in tensors.values())
    if method in ("vera", "rlora"):  # two vectors for each of two sites
        assert sum(value.size for value in tensors.values()) == gp.trainable(model)[0]


def test_adapters_of_one_graph_share_method_and_seed(tmp_path: Path) -> None:
    model = hand("qv:vera(r=8)", "qv:vera(r=16)")
    with pytest.raises(ExportError, match=r"adapter 'b' has vera\(r=16\) at w., not vera\(r=8\) at w. as 'a'"):
        export(model, tmp_path / "x", inputs=SAMPLE, compact=True)
    model = tiny("hand")
    for seed, name in enumerate("ab"):
        gp.apply(model, "qv:rlora(r=8)", name=name, inputs=SAMPLE, seed=seed)
    with pytest.raises(ExportError, match="the seed 1, not 0"):
        export(model, tmp_path / "x", inputs=SAMPLE, compact=True)
    assert not list(tmp_path.iterdir())


def test_an_update_relative_to_the_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"w. is an update|w..*: adapter 'a' is an update relative to the base weight"
    ):
        export(hand("qv:dora(r=2)"), tmp_path / "x", inputs=SAMPLE, compact=True)


def test_options_that_exclude_each_other(tmp_path: Path) -> None:
    for other in ({"rows": True}, {"merged": True}):
        with pytest.raises(ExportError, match="Choose one"):
            export(hand(), tmp_path / "x", inputs=SAMPLE, compact=True, **other)


def test_compact_adapters_do_not_blend(tmp_path: Path) -> None:
    export(hand("qv:vera(r=8)", "qv:vera(r=8)"), tmp_path / "x", inputs=SAMPLE, compact=True, verify="off")
    session = Session(tmp_path / "x")
    with pytest.raises(AdapterError, match="cannot be added or concatenated"):
        session.use({"a": 0.5, "b": 0.5})
