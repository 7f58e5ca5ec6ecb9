"""What an adapter costs per call: a Llama of width 768 with graphpeft, with PEFT and with none, interleaved in one run.

`python benchmarks/overhead.py` prints ratios to the bare model, of process CPU time on one thread, median and spread
over rounds. Every round times each contender once, in turn, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import peft
import torch
import transformers

import graphpeft as gp

RULES = {
    "qv:lora(r=8)": ["q_proj", "v_proj"],
    "linear:lora(r=8)": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def contenders(layers: int) -> dict[str, torch.nn.Module]:
    """The bare model and copies of it with adapters; equal weights, and every adapter does something."""
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=768, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=12
    )
    torch.manual_seed(0)
    bare = transformers.LlamaForCausalLM(config).eval()
    made: dict[str, torch.nn.Module] = {"base": bare}
    for rules, targets in RULES.items():
        made[f"graphpeft {rules}"] = gp.apply(copy.deepcopy(bare), rules)
        config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=targets)
        made[f"peft {rules}"] = peft.get_peft_model(copy.deepcopy(bare), config).eval()
    made["graphpeft qv:rlora"] = gp.apply(copy.deepcopy(bare), "qv:rlora")
    return made


def forward(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)


def training_step(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    """Forward and backward; the bare model trains in full."""
    model.zero_grad()
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = contenders(options.layers)
    for title, work, shape in [("forward 1×64", forward, (1, 64)), ("forward 4×128", forward, (4, 128)),
                               ("training 4×128", training_step, (4, 128))]:  # fmt: skip
        tokens = torch.randint(0, 512, shape)
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(options.rounds + 1):
            for name, model in models.items():
                start = time.process_time()
                work(model, tokens)
                times[name].append(time.process_time() - start)
        print(f"{title:<16} {'ms':>8} {'ratio':>7} {'lowest':>7} {'highest':>8}")
        for name, taken in times.items():
            ratios = [t / b for t, b in zip(taken[1:], times["base"][1:], strict=True)]
            print(
                f"{name:<27} {1e3 * statistics.median(taken[1:]):>8.1f} {statistics.median(ratios):>7.3f} "
                f"{min(ratios):>7.3f} {max(ratios):>8.3f}"
            )


if __name__ == "__main__":
    main()
