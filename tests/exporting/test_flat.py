"""Models as functions of named tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exports import CLOSE, SAMPLE, ids, off, tiny
from torch import nn

from graphpeft.errors import ExportError
from graphpeft.exporting.flat import Flat
from graphpeft.exporting.parts import parts


def test_equal_sizes_of_batch_and_sequence_are_refused() -> None:
    with pytest.raises(ExportError, match=r"batch size 4 and lengths \[4\]"):
        Flat.of(tiny("bert"), ids(4, 4))


def test_outputs_must_be_tensors() -> None:
    class Nested(nn.Module):
        def __init__(self, *kinds: str) -> None:
            super().__init__()
            self.kinds = kinds

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {kind: x if kind == "plain" else (x,) for kind in self.kinds}

    flat = Flat.of(Nested("plain", "cache"), SAMPLE)
    assert (flat.outputs, flat.dropped) == (("plain",), ("cache",))
    with pytest.raises(ExportError, match="Nested returns no tensor"):
        Flat.of(Nested("cache"), SAMPLE)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_past_in_tensors_does_what_the_whole_sequence_does(name: str) -> None:
    model, tokens = tiny(name), ids(2, 8)["input_ids"]
    flat = Flat.of(model, ids(2, 7), cached=True)
    assert flat.cache is not None
    assert flat.outputs == ("logits", *flat.cache.outputs)
    assert {"attention_mask", "position_ids", *flat.cache.inputs} < set(flat.inputs)

    def step(start: int, stop: int, past: dict[str, Any]) -> dict[str, Any]:
        positions = torch.arange(start, stop).repeat(2, 1)
        tensors = {name.replace("present", "past_key_values"): torch.as_tensor(value) for name, value in past.items()}
        given = {"attention_mask": torch.ones(2, stop, dtype=torch.long), "position_ids": positions}
        found = flat({"input_ids": tokens[:, start:stop], **given, **tensors})
        return {name: value for name, value in found.items() if name != "logits"} | {"": found["logits"]}

    with torch.no_grad():
        want = model(tokens).logits.numpy()
        kept: dict[str, Any] = {key: flat.inputs[key][:, :, :0] for key in flat.cache.inputs}
        for start, stop in ((0, 5), (5, 6), (6, 8)):
            kept = step(start, stop, kept)
            # Sums in another order, as in `CLOSE`.
            assert off(kept.pop(""), want[:, start:stop]) < CLOSE


def test_a_model_of_two_halves_becomes_two_graphs() -> None:
    (first, encoder), (second, decoder) = parts(tiny("t5"))
    assert (first, second) == ("encoder", "decoder")
    assert set(encoder.inputs) == {"input_ids", "attention_mask"}
    assert encoder.outputs == ("encoder_hidden_states",)
    assert {"input_ids", "encoder_hidden_states", "encoder_attention_mask"} < set(decoder.inputs)
    assert decoder.cache is not None
    assert decoder.cache.crossed
    ((name, whole),) = parts(tiny("t5"), cached=False)
    assert (name, whole.cache) == ("model", None)


@pytest.mark.parametrize(("batch", "length"), [(2, 7), (3, 7), (5, 2), (2, 3)])
def test_no_two_sizes_of_a_cached_sample_are_equal(batch: int, length: int) -> None:
    flat = Flat.of(tiny("llama"), ids(batch, length), cached=True)
    past = flat.inputs["past_key_values.0.key"].shape[2]
    assert flat.inputs["attention_mask"].shape[1] == past + length
    assert len({batch, length, past, past + length}) == 4


def test_an_encoder_and_a_decoder_need_tokens_of_both() -> None:
    with pytest.raises(ExportError, match="no decoder_input_ids"):
        list(parts(tiny("t5"), ids(2, 7)))
