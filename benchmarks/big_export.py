"""Does the export of a model over 2 GB work, in which time, and how much memory does it take beside the model's own size?

`python benchmarks/big_export.py`: a Llama of a 1B shape with random weights in float32, LoRA r=8 on q and v. Prints the size
of the weights, the peak of the process's resident memory before and after the export, and how much of it was not a mapped
file: ONNX Runtime maps the weights that it verifies, which the system takes back when it needs the memory.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers

import graphpeft as gp


def build(layers: int, width: int) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=width // 256, vocab_size=32000,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def peak() -> float:
    """Largest resident memory so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@contextmanager
def anonymous() -> Iterator[list[float]]:
    """The largest memory that is no mapped file, in GB, looked at ten times a second (Linux)."""
    most, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            lines = Path("/proc/self/status").read_text().splitlines()
            most[0] = max(most[0], *(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("RssAnon")))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--verify", default="fast", choices=["off", "fast", "full"])
    given = parser.parse_args()
    model = build(given.layers, given.width)
    gp.apply(model, "qv:lora(r=8)", verify="off")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(len(name)))
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    before = peak()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, anonymous() as most:
        report = gp.export(model, f"{folder}/deploy", verify=given.verify)
    print(report)
    print(
        f"weights {size:.2f} GB, peak before the export {before:.2f} GB, after {peak():.2f} GB = {peak() / size:.2f} × the "
        f"weights, {most[0]:.2f} GB = {most[0] / size:.2f} × without mapped files; {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
