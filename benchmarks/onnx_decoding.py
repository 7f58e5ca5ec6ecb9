"""What opset and `accuracy_level` of an export do for decoding in onnxruntime-genai: a random Llama with slots, float and int4.

`python benchmarks/onnx_decoding.py [--width 1024]` prints CPU time on one thread for a token and for a prompt of 128, as medians
over rounds, and ratios to the export with the settings of earlier versions (opset 20, accuracy_level 0), with their quartiles.
Every round runs each contender once, in turn and back again. What float graphs write is compared first: it has to be equal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime_genai as og
import torch
import transformers

import graphpeft as gp
from graphpeft.show.table import table

PROMPT, TOKENS = 128, 96
KINDS: dict[str, dict[str, Any]] = {
    "float, opset 20": {"opset": 20},
    "float, opset 23": {"opset": 23},
    "int4, opset 20, level 0": {"opset": 20, "quantize": "int4", "accuracy_level": 0},
    "int4, opset 20, level 4": {"opset": 20, "quantize": "int4", "accuracy_level": 4},
    "int4, opset 23, level 0": {"opset": 23, "quantize": "int4", "accuracy_level": 0},
    "int4, opset 23, level 4": {"opset": 23, "quantize": "int4", "accuracy_level": 4},
}


class Run(NamedTuple):
    prompt: float
    token: float
    written: list[int]


def llama(width: int) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    model = gp.apply(transformers.LlamaForCausalLM(config).eval(), "linear:lora(r=8)")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)
    return model


def opened(folder: Path) -> og.Model:
    """The export in onnxruntime-genai, on one thread."""
    path = folder / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = 1
    path.write_text(json.dumps(config))
    return og.Model(str(folder))


def run(model: og.Model, adapters: og.Adapters | None) -> Run:
    prompt = np.random.default_rng(0).integers(3, 1000, PROMPT).astype(np.int32)
    given = og.GeneratorParams(model)
    given.set_search_options(max_length=PROMPT + TOKENS, min_length=PROMPT + TOKENS, do_sample=False, batch_size=1)
    generator = og.Generator(model, given)
    if adapters is not None:
        generator.set_active_adapter(adapters, "default")
    start = time.process_time()
    generator.append_tokens(prompt)
    generator.generate_next_token()
    first = time.process_time()
    count = 0
    while not generator.is_done():
        generator.generate_next_token()
        count += 1
    return Run(first - start, (time.process_time() - first) / count, list(generator.get_sequence(0))[PROMPT:])


def ratio(ours: list[float], theirs: list[float]) -> str:
    low, middle, high = statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=11)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = llama(given.width)
    with tempfile.TemporaryDirectory() as name:
        models, adapters = {}, {}
        for kind, options in KINDS.items():
            folder = Path(name) / kind.replace(" ", "_").replace(",", "")
            gp.export(model, folder, verify="off", **options)
            models[kind] = opened(folder)
            adapters[kind] = og.Adapters(models[kind])
            adapters[kind].load(str(folder / "default.onnx_adapter"), "default")
        runs: dict[tuple[str, bool], list[Run]] = {(kind, on): [] for kind in models for on in (False, True)}
        for number in range(given.rounds):
            for kind, on in list(runs)[:: 1 if number % 2 else -1]:
                runs[kind, on].append(run(models[kind], adapters[kind] if on else None))
        assert runs["float, opset 20", True][0].written == runs["float, opset 23", True][0].written
        assert runs["float, opset 20", True][0].written != runs["float, opset 20", False][0].written
    rows = []
    for (kind, on), found in runs.items():
        before = runs["float, opset 20" if kind.startswith("float") else "int4, opset 20, level 0", on]
        token, prompt = ([getattr(one, what) for one in found] for what in ("token", "prompt"))
        rows.append(
            (
                kind,
                "rank 8" if on else "none",
                f"{1e3 * statistics.median(token):.3f}",
                ratio(token, [one.token for one in before]),
                f"{1e3 * statistics.median(prompt):.1f}",
                ratio(prompt, [one.prompt for one in before]),
            )
        )
    columns = ("export", "adapter", "ms a token", "to earlier settings", f"ms for {PROMPT}", "to earlier settings")
    print(f"width {given.width}, {given.rounds} rounds")
    print(table(columns, rows))


if __name__ == "__main__":
    main()
