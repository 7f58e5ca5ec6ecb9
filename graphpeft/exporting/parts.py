"""The graphs of an exported model: one, or an encoder that runs once and a decoder that runs for every token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from graphpeft.capturing.capture import Inputs, example_call
from graphpeft.errors import ExportError
from graphpeft.exporting.flat import Flat


def parts(model: nn.Module, inputs: Inputs = None, *, cached: bool = True) -> Iterator[tuple[str, Flat]]:
    """Each graph's name, and the graph as a function of named tensors."""
    if not (cached and _translates(model)):
        yield "model", Flat.of(model, inputs, cached=cached)
        return
    _, given = example_call(model, inputs)
    if (ids := given.pop("decoder_input_ids", None)) is None:
        raise ExportError(
            f"{type(model).__name__} has an encoder and a decoder, and the sample inputs have no decoder_input_ids. Add "
            "them, with a length unequal to the encoder's, or export one graph with cache=False."
        )
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    encoder = Flat.of(Encoder(model), tensors, prefix="model.")
    yield "encoder", encoder
    states = {"encoder_hidden_states": encoder.model(**encoder.inputs)["encoder_hidden_states"]}
    if "input_ids" in encoder.inputs and "attention_mask" in encoder.inputs:
        states["encoder_attention_mask"] = encoder.inputs["attention_mask"]
    yield "decoder", Flat.of(Decoder(model), {"input_ids": ids, **states}, cached=True, prefix="model.")


def _translates(model: nn.Module) -> bool:
    """Whether the model is an encoder and a decoder that generates from the encoder's states."""
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and getattr(model, "can_generate", lambda: False)()


class Encoder(nn.Module):
    """The encoder, which runs once for a text or a recording."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {"encoder_hidden_states": self.model.get_encoder()(**inputs).last_hidden_state}  # type: ignore[operator]


class Decoder(nn.Module):
    """The decoder, which runs for every token with a KV cache; cross-attention keys and values are recomputed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def can_generate(self) -> bool:
        return True

    def forward(
        self,
        input_ids: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = True,
    ) -> dict[str, Any]:
        from transformers.modeling_outputs import BaseModelOutput

        states = BaseModelOutput(last_hidden_state=encoder_hidden_states)
        masked = {} if encoder_attention_mask is None else {"attention_mask": encoder_attention_mask}
        found = self.model(
            encoder_outputs=states, decoder_input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache, **masked
        )  # fmt: skip
        return {"logits": found.logits, "past_key_values": found.past_key_values}
