"""The README's code: adapt a model, train it a little, save, merge, export, run. Takes a few seconds on a CPU."""

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphpeft as gp

config = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config)  # any model: from_pretrained(...), your own nn.Module, an exported program

print(gp.plan(model, "qv:rlora; mlp:lora(r=4)"))  # what would be adapted; nothing is changed yet
gp.apply(model, rules="qv:rlora; mlp:lora(r=4)")  # in place; also returns the model

tokens = torch.randint(3, 128, (4, 16))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
for _ in range(10):  # any training loop, Trainer, accelerate
    loss = model(tokens, labels=tokens).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

folder = Path(tempfile.mkdtemp())
gp.save(model, folder / "adapter")  # kilobytes
print(gp.explain(model))  # sites, adapters, how far they moved
print(gp.diff(model))  # the graphs before and after, equal layers folded
gp.export(model, folder / "onnx")  # one base graph, swappable adapters, checked against PyTorch

session = gp.Session(folder / "onnx")
session.use("default")
print(session.run({"input_ids": tokens.numpy()})["logits"].shape)
print(session.generate({"input_ids": tokens.numpy()}, max_new_tokens=5)[:, -5:])  # greedy, with the key-value cache

gp.merge(model)  # fold: a plain model again
gp.unmerge(model)  # and back, bit for bit
gp.remove(model)
