"""Experiments E1 to E3: OLoRA, MELoRA, VeRA and RLoRA against LoRA on a byte language model.

`python benchmarks/claims/run.py` tunes the learning rate of every method on two seeds that are not reported, runs the
reported seeds (paired: equal data order for all methods), and writes results.json beside this file.
`--short` takes fewer steps, rates and seeds: it shows that everything runs, and decides nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean

import torch
from byte_lm import Run, adapt, corpus
from criteria import CRITERIA, EQUAL_LR, Results
from rich.progress import track

HERE = Path(__file__).parent
CHECKPOINTS = (25, 50, 75, 100, 125)
TUNING = 100
"""The first seed that chooses learning rates; none of them is reported."""
FULL_RATES, DIAGONAL_RATES = (1e-3, 3e-3, 1e-2, 3e-2), (1e-2, 3e-2, 1e-1, 3e-1)
RATES = {
    "lora(r=8)": FULL_RATES, "olora(r=8)": FULL_RATES, "pissa(r=8)": FULL_RATES, "olora(r=8, pivot=true)": FULL_RATES,
    "lora(r=1)": (*FULL_RATES, 1e-1), "lora(r=2)": FULL_RATES, "lora(r=4)": FULL_RATES,
    "melora(n=8, r=1)": (*FULL_RATES, 1e-1),
    "vera(r=64)": DIAGONAL_RATES, "vera(r=256)": DIAGONAL_RATES,
    "rlora(r=64)": DIAGONAL_RATES, "rlora(r=64, rows=uniform)": DIAGONAL_RATES,
    "rlora(r=64, train=in_out)": DIAGONAL_RATES, "rlora(r=64, train=in_mid_out)": DIAGONAL_RATES,
    "rlora(r=32, train=core)": FULL_RATES,
}  # fmt: skip
Job = tuple[str, float, int, int, int]
"""Method, learning rate, seed, steps, steps of pretraining."""


def work(job: Job) -> Run:
    torch.set_num_threads(1)
    method, lr, seed, steps, pretraining = job
    checkpoints = tuple(c for c in CHECKPOINTS if c < steps)
    return adapt(method, lr, seed, steps, width=64, pretraining=pretraining, checkpoints=checkpoints)


def sweep(jobs: list[Job], title: str) -> list[Run]:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        return list(track(pool.imap(work, jobs), title, total=len(jobs)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--seeds", type=int, default=8, help="reported seeds")
    parser.add_argument("--tuning", type=int, default=2, help="seeds that choose the learning rates")
    options = parser.parse_args()
    start = time.perf_counter()
    steps, pretraining, seeds = (30, 100, 2) if options.short else (150, 1000, options.seeds)
    rates = {method: grid[1:3] if options.short else grid for method, grid in RATES.items()}
    tuning = range(TUNING, TUNING + (1 if options.short else options.tuning))
    tuned = sweep([(m, lr, s, steps, pretraining) for m in rates for lr in rates[m] for s in tuning], "tuning")
    best = {
        method: min(grid, key=lambda lr: mean(r.final for r in tuned if (r.method, r.lr) == (method, lr)))
        for method, grid in rates.items()
    }
    wanted = set(best.items()) | {(m, EQUAL_LR) for m in rates if EQUAL_LR in rates[m]}
    runs = sweep([(m, lr, s, steps, pretraining) for m, lr in sorted(wanted) for s in range(seeds)], "reported seeds")
    results = Results(runs, best)
    verdicts = [criterion(results) for criterion in CRITERIA]
    for verdict in verdicts:
        print(f"{'holds   ' if verdict.holds else 'does not'} {verdict.claim}: {verdict.figures}")
    for method in rates:
        gains = results.gain(method)
        print(f"{method:<32} {results.of(method)[0].trained:>7,} lr {best[method]:<6g} gain {mean(gains):.3f}")
    if not options.short:
        facts = {"corpus_sha256": corpus().digest, "python": platform.python_version(), "torch": torch.__version__}
        content = {
            "facts": facts, "seconds": round(time.perf_counter() - start), "best_rates": best,
            "verdicts": [asdict(v) for v in verdicts], "runs": [asdict(r) for r in runs],
            "tuning": [asdict(r) for r in tuned],
        }  # fmt: skip
        (HERE / "results.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
