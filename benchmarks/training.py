"""What a training step with adapters costs in time and memory: graphpeft beside PEFT, interleaved in one run.

`python benchmarks/training.py` trains MiniLM (batch 16, length 64) and a Llama of 6 layers and width 768 (batch 4, length 128),
with LoRA of rank 8 on q and v or on all linear maps, the base in float32 or bfloat16, adapters in float32, AdamW. A processor
without instructions for bfloat16 gets few tokens in it (batch 1, length 8). Time is CPU time on one thread, as a ratio to the
frozen model: a pass forward, and back to the embeddings, without gradients of weights, which is the least that training below
the last layer takes. Medians, with quartiles in brackets, over rounds in which all contenders run in turn.

Memory is what a step allocates at most beyond what is there between steps: activations, gradients, and what is computed with.
It is counted by torch's profiler, to the byte, so it does not depend on the machine's load.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from torch import nn
from torch.profiler import ProfilerActivity, profile

import graphpeft as gp
from graphpeft.demo.model import load

MODELS = {"minilm": (16, 64), "llama": (4, 128)}
FEW = (1, 8)
"""For bfloat16 where its products take twenty times as long, and four times as many rounds."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGETS = {
    ("qv", "minilm"): ["query", "value"],
    ("qv", "llama"): ["q_proj", "v_proj"],
    ("linear", "minilm"): ["query", "key", "value", "dense"],
    ("linear", "llama"): ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
TOOLS = ("frozen", "graphpeft", "peft")


def slow(dtype: torch.dtype) -> bool:
    """Whether the processor has no instructions for products in `dtype`."""

    def once(dtype: torch.dtype) -> float:
        x, y = torch.ones(2, 512, 768, dtype=dtype), torch.ones(2, 768, 768, dtype=dtype)
        start = time.process_time()
        x @ y
        return time.process_time() - start

    return min(once(dtype) for _ in range(5)) > 4 * min(once(torch.float32) for _ in range(5))


def base(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    if name == "llama":
        config = transformers.LlamaConfig(
            vocab_size=512, hidden_size=768, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=12
        )
        return transformers.LlamaForCausalLM(config).to(dtype).train()
    return load(2)[0].encoder.to(dtype).train()


def made(tool: str, name: str, targets: str, dtype: torch.dtype) -> nn.Module:
    model = base(name, dtype)
    if tool == "graphpeft":
        return gp.apply(model, f"{targets}:lora(r=8)")
    if tool == "peft":
        return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS[targets, name]))
    return model.requires_grad_(False)


def step(tool: str, name: str, model: nn.Module, size: tuple[int, int]) -> Callable[[], None]:
    """One step of training, or for the frozen model the same without weights to train."""
    ids = torch.randint(3, 500, size, generator=torch.Generator().manual_seed(0))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    call = {"use_cache": False} if name == "llama" else {}
    mask = torch.ones_like(ids)
    embed = model.get_input_embeddings() if tool == "frozen" else None

    def run() -> None:
        given = {"input_ids": ids} if embed is None else {"inputs_embeds": embed(ids).requires_grad_()}
        output = model(**given, attention_mask=mask, **call)
        value = output.logits if name == "llama" else output.last_hidden_state
        value.float().square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run


def seconds(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {tool: [] for tool in runs}
    for i in range(rounds):
        for tool in sorted(runs, reverse=i % 2 == 1):  # no one always has the same cache before it
            start = time.process_time()
            runs[tool]()
            times[tool].append(time.process_time() - start)
    return times


def peak(run: Callable[[], None]) -> float:
    """The most that torch holds during a step beyond what it held before, in MB of a million bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())["traceEvents"]
    events = sorted((event for event in trace if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    totals = [event["args"]["Total Allocated"] for event in events]
    return (max(totals) - (totals[0] - events[0]["args"]["Bytes"])) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{'':<22} {'graphpeft':>18} {'PEFT':>18} {'ours / theirs':>16} {'peak MB, frozen':>16} {'graphpeft':>10} {'PEFT':>7}"
    )
    for name in MODELS:
        for targets in ("qv", "linear"):
            for dtype in DTYPES:
                few = slow(DTYPES[dtype])
                size = FEW if few else MODELS[name]
                runs = {tool: step(tool, name, made(tool, name, targets, DTYPES[dtype]), size) for tool in TOOLS}
                for run in runs.values():  # the optimizer makes its state in the first step
                    run()
                times = seconds(runs, options.rounds * (4 if few else 1))
                cells = []
                for one, other in (("graphpeft", "frozen"), ("peft", "frozen"), ("graphpeft", "peft")):
                    ratios = [a / b for a, b in zip(times[one], times[other], strict=True)]
                    low, middle, high = statistics.quantiles(ratios, n=4)
                    cells.append(f"{middle:.2f} ({low:.2f}-{high:.2f})")
                peaks = [peak(run) for run in runs.values()]
                print(
                    f"{name + ' ' + targets + ' ' + dtype:<22} {cells[0]:>18} {cells[1]:>18} {cells[2]:>16} "
                    f"{peaks[0]:>16.2f} {peaks[1]:>10.2f} {peaks[2]:>7.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
