"""A batch whose rows have adapters of their own, beside the same rows run adapter by adapter, and PEFT's mixed batch.

`python benchmarks/per_row.py` prints process CPU time on one thread as ratios to the base model on the whole batch: medians
over rounds in which every contender runs in turn. Eight rows of 64 tokens, four adapters of rank 8 on all linear maps, a Llama
of 6 layers and width 768.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack

import peft
import torch
import transformers

import graphpeft as gp

NAMES = ["a", "b", "c", "d"]
ROWS = NAMES * 2


def made() -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    """The bare model, and copies with four adapters each, of graphpeft and of PEFT."""
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=768, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=12
    )
    torch.manual_seed(0)
    bare = transformers.LlamaForCausalLM(config).eval()
    ours, theirs = copy.deepcopy(bare), copy.deepcopy(bare)
    lora = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    for i, name in enumerate(NAMES):
        gp.apply(ours, "linear:lora(r=8)", name=name, seed=i)
        theirs = peft.get_peft_model(theirs, lora, name) if i == 0 else theirs
        if i:
            theirs.add_adapter(name, lora)
    return bare, ours, theirs.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bare, ours, theirs = made()
    tokens = torch.randint(0, 512, (8, 64))
    alone = copy.deepcopy(ours)
    gp.activate(alone, "a")
    split = copy.deepcopy(ours)

    def by_adapter() -> None:
        for name in NAMES:
            gp.activate(split, name)
            split(tokens[[i for i, each in enumerate(ROWS) if each == name]], use_cache=False)

    with ExitStack() as stack:
        start = time.process_time()
        stack.enter_context(gp.per_row(ours, ROWS))
        print(f"entering gp.per_row: {time.process_time() - start:.3f} s")
        contenders: dict[str, Callable[[], object]] = {
            "base": lambda: bare(tokens, use_cache=False),
            "one adapter": lambda: alone(tokens, use_cache=False),
            "gp.per_row": lambda: ours(tokens, use_cache=False),
            "adapter by adapter": by_adapter,
            "PEFT, adapter_names": lambda: theirs(input_ids=tokens, use_cache=False, adapter_names=ROWS),
        }
        times: dict[str, list[float]] = {name: [] for name in contenders}
        with torch.no_grad():
            for _ in range(options.rounds + 1):
                for name, run in contenders.items():
                    start = time.process_time()
                    run()
                    times[name].append(time.process_time() - start)
    for name, taken in times.items():
        ratios = [t / b for t, b in zip(taken[1:], times["base"][1:], strict=True)]
        print(f"{name:<22} {statistics.median(ratios):>6.2f} {min(ratios):>6.2f} {max(ratios):>6.2f}")


if __name__ == "__main__":
    main()
