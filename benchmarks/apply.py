"""Time and memory of inserting adapters into a 7B-shaped Llama on the meta device, beside PEFT in the same run.

Each case runs in a process of its own, in turn, several times: `python benchmarks/apply.py --repeats 3`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

RULES = {"qv:lora(r=8)": ["q_proj", "v_proj"], "linear:lora(r=8)": "all-linear"}


def run(tool: str, rules: str, layers: int) -> dict[str, float]:
    import torch
    import transformers

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=layers, dtype="bfloat16"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if tool == "peft":
        import peft

        start = time.perf_counter()
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=8, target_modules=RULES[rules]))
    else:
        import graphpeft as gp

        start = time.perf_counter()
        gp.apply(model, rules)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"seconds": seconds, "peak_gb": peak / 2**20, "grown_gb": (peak - before) / 2**20, "trained": trained}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run(*options.case, options.layers)))
        return
    cases = [(tool, rules) for rules in RULES for tool in ("graphpeft", "peft")]
    results: dict[tuple[str, str], list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(options.repeats):
        for case in cases:
            command = [sys.executable, str(Path(__file__)), "--layers", str(options.layers), "--case", *case]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[case].append(json.loads(output.splitlines()[-1]))
    print(f"{'rules':<18} {'tool':<10} {'seconds min / max':>18} {'peak GB':>8} {'grown GB':>9} {'trained':>12}")
    for (tool, rules), runs in results.items():
        seconds = [r["seconds"] for r in runs]
        print(
            f"{rules:<18} {tool:<10} {min(seconds):>8.2f} / {max(seconds):<7.2f} {max(r['peak_gb'] for r in runs):>8.2f} "
            f"{max(r['grown_gb'] for r in runs):>9.2f} {int(runs[0]['trained']):>12,}"
        )


if __name__ == "__main__":
    main()
