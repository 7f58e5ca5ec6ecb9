"""Peak memory and time of merging in memory, beside PEFT: one process for each, with 0.6 GB of bfloat16 weights.

`python benchmarks/merge_memory.py` prints what the peak grew by, in GB, and CPU seconds.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
import warnings

import torch
from transformers import LlamaConfig, LlamaForCausalLM

WAYS = ("keep", "final", "peft")


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(way: str) -> None:
    warnings.filterwarnings("ignore")
    config = LlamaConfig(
        vocab_size=256, hidden_size=1536, intermediate_size=4096, num_hidden_layers=10, num_attention_heads=12,
        num_key_value_heads=12, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)  # a model that was built in float32 first would hide the peak
    model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    if way == "peft":
        import peft

        adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))
        run = adapted.merge_and_unload
    else:
        import graphpeft as gp

        gp.apply(model, "linear:lora(r=8)")
        run = lambda: gp.merge(model, keep=way == "keep")  # noqa: E731
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    before, start = peak(), time.process_time()
    run()
    print(f"{way:6} weights {size:.2f} GB, peak +{peak() - before:.2f} GB, {time.process_time() - start:.1f} s")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1])
    else:
        for each in WAYS:
            subprocess.run([sys.executable, __file__, each], check=True)
