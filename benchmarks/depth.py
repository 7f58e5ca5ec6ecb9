"""Seconds to capture 7B-shaped Llamas of many depths, block by block and with equal blocks left out, and to find sites.

The models are on the meta device. Each depth runs in a process of its own: `python benchmarks/depth.py --layers 8 32`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

DEPTHS = [8, 32, 80, 128]


def run(layers: int) -> dict[str, float]:
    import torch
    import transformers

    import graphpeft as gp
    from graphpeft.capturing.normalize import normalize
    from graphpeft.match.find import find

    torch.set_num_threads(1)
    with torch.device("meta"):
        models = [
            transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=n, dtype="bfloat16"))
            for n in (4, layers)
        ]
    for blocks in (True, False):  # what torch loads on first use is no part of the figures
        gp.capture(models[0], blocks=blocks)
    seconds: dict[str, float] = {}
    for name, blocks in (("full", False), ("blocks", True)):
        start = time.perf_counter()
        program = gp.capture(models[1], blocks=blocks)
        seconds[name] = time.perf_counter() - start
    start = time.perf_counter()
    found = find(normalize(program))
    seconds["find"] = time.perf_counter() - start
    return {**seconds, "sites": len(found.sites), "nodes": len(program.graph.nodes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run(options.case)))
        return
    columns = ("full", "blocks", "find")
    print(f"{'layers':>6} {'sites':>6} {'nodes':>6}" + "".join(f"{c + ' s':>10}{'ms/layer':>9}" for c in columns))
    for layers in options.layers:
        command = [sys.executable, str(Path(__file__)), "--case", str(layers)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        row = json.loads(output.splitlines()[-1])
        cells = "".join(f"{row[c]:>10.2f}{row[c] / layers * 1000:>9.1f}" for c in columns)
        print(f"{layers:>6} {row['sites']:>6} {row['nodes']:>6}{cells}", flush=True)


if __name__ == "__main__":
    main()
