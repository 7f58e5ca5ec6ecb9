"""What it costs to switch adapters off and on, and to check the record before a forward pass, on a model with 224 owners.

The model has the shape of a 7B decoder (32 layers of 7 projections) with narrow layers: switching does not depend on width.
CPU milliseconds, the least of several runs. `python benchmarks/switching.py`
"""

from __future__ import annotations

import gc
import linecache
import time
import warnings
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphpeft as gp
from graphpeft.rewrite import owner
from graphpeft.rewrite.reality import same
from graphpeft.rewrite.state import get_state


def least(run: Callable[[], object], times: int = 30) -> float:
    """CPU milliseconds of one run."""
    found = []
    for _ in range(times):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found) * 1e3


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=32,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = gp.apply(LlamaForCausalLM(config).eval(), "linear:lora(r=4)")
    state = get_state(model)

    def off_and_on() -> None:
        gp.activate(model, None)
        gp.activate(model, "default")

    def within() -> None:
        with gp.disabled(model):
            pass

    def strengths() -> None:
        for step in range(100):
            gp.activate(model, {"default": 1 + step / 100})

    def counts() -> tuple[int, int]:
        gc.collect()
        return len(owner._shared), sum(str(name).startswith("<graphpeft") for name in linecache.cache)

    print(f"owners: {len(state.containers)}")
    print(f"gp.activate off and on: {least(off_and_on):.2f} ms")
    print(f"with gp.disabled: {least(within):.2f} ms")
    print(f"check before a forward pass: {least(lambda: [same(state) for _ in range(100)]) * 10:.1f} µs")
    before = counts()
    for _ in range(100):
        strengths()
    print(f"classes and sources, before and after 10,000 activations: {before}, {counts()}")


if __name__ == "__main__":
    main()
