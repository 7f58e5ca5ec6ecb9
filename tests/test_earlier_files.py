"""What earlier versions wrote keeps loading: tensors bit for bit, and the outputs that they had there.

`tests/fixtures/0.1` was written by commit c401f53, before modules moved: a tiny Llama's weights, two adapters (one of
them with every method), a PEFT folder, an export, and the logits that PyTorch gave.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import graphpeft as gp
from graphpeft.rewrite.state import chains, saved

OLD = Path(__file__).parent / "fixtures" / "0.1"
TOKENS = torch.arange(10).reshape(2, 5)
WANTED = load_file(OLD / "wanted.safetensors")
CLOSE = 1e-5
"""float32 logits of size 1: other processors sum in another order."""


def base() -> nn.Module:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(load_file(OLD / "base.safetensors"))
    return model


@pytest.mark.parametrize("name", ["all", "pair"])
def test_an_adapter_loads_bit_for_bit(name: str) -> None:
    model = gp.load(base(), OLD / f"adapter_{name}").eval()
    stored = load_file(OLD / f"adapter_{name}" / "adapter.safetensors")
    loaded = {key: tensor for site, chain in chains(model, name).items() for key, tensor in saved(site, chain)}
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[key]) for key, tensor in loaded.items())
    found = model(TOKENS).logits
    assert (found - base()(TOKENS).logits).abs().max() > 0.01
    torch.testing.assert_close(found, WANTED[name], rtol=0, atol=CLOSE)


def test_a_peft_folder_loads() -> None:
    found = gp.load(base(), OLD / "peft_pair", "theirs").eval()(TOKENS).logits
    torch.testing.assert_close(found, WANTED["peft_pair"], rtol=0, atol=CLOSE)


def test_an_export_runs() -> None:
    session = gp.Session(OLD / "export_pair")
    session.use("pair")
    found = session.run({"input_ids": TOKENS.numpy(), "attention_mask": np.ones((2, 5), np.int64)})["logits"]
    np.testing.assert_allclose(found, WANTED["pair"].numpy(), rtol=0, atol=CLOSE)
