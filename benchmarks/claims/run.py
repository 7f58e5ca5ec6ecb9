"""The papers' claims, E1 to E5: tune, run the reported seeds, judge by criteria written before, keep everything.

`python benchmarks/claims/run.py` runs all of it and writes the files in results/, which `page.py` makes docs/claims.md of.
`--only E4 E5` runs some experiments, `--task digits` some tasks of E1 to E3; files are written for whole tasks alone.
`--short` takes few steps, seeds and rates: it shows that everything runs, decides nothing and writes nothing.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import adapting
import byte_lm
import criteria_few_shot
import criteria_gates
import docstrings
import few_shot
import gates
import names
import results
from adapting import EXPERIMENTS, TASKS

ALL = (*EXPERIMENTS, "E4", "E5")
DATA = {"byte_lm": lambda: byte_lm.corpus().digest, "docstrings": docstrings.digest, "few_shot": names.digest}

LENGTHS = {"gates": (range(5), 600)}
"""Of E5: seeds and steps by the name of the file."""


def adapt(task: adapting.Task, only: list[str], short: bool) -> dict[str, Any]:
    wanted = {method for name in only if name in EXPERIMENTS for method in EXPERIMENTS[name]}
    methods = tuple(method for method in task.methods if method in wanted)
    seeds, tuning, steps = (2, 1, task.steps // 10) if short else (5, task.tuning, task.steps)
    return adapting.run(task, methods, seeds, tuning, steps, short)


def few(short: bool) -> dict[str, Any]:
    found = few_shot.run(*((3, 2, 1, 20) if short else (30, 12, 3, 60)), short=short)
    return found | {"verdicts": [asdict(v) for v in criteria_few_shot.verdicts(found["runs"])]}


def gated(seeds: range, steps: int, short: bool) -> dict[str, Any]:
    found = gates.run(seeds[:2], 1, 10, gates.LAMBDAS[::2]) if short else gates.run(seeds, 2, steps)
    return found | {"verdicts": [asdict(v) for v in criteria_gates.verdicts(found["runs"])]}


def perform(name: str, experiment: Callable[[], dict[str, Any]], keep: bool) -> None:
    """Run, print the verdicts, and keep the results at once, so that a later failure loses nothing."""
    start = time.perf_counter()
    found = experiment()
    for verdict in found["verdicts"]:
        print(f"{'holds   ' if verdict['holds'] else 'does not'} {verdict['claim']}: {verdict['figures']}")
    if keep:
        data = {"data_sha256": DATA[name]()} if name in DATA else {}
        results.write(name, data | {"seconds": round(time.perf_counter() - start)} | found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", nargs="+", choices=ALL, default=list(ALL))
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    given = parser.parse_args()
    if "E4" in given.only:
        perform("few_shot", lambda: few(given.short), not given.short)
    if "E5" in given.only:
        for name, (seeds, steps) in LENGTHS.items():
            perform(name, lambda seeds=seeds, steps=steps: gated(seeds, steps, given.short), not given.short)
    for task in (TASKS[name] for name in given.task if set(given.only) & EXPERIMENTS.keys()):
        whole = set(given.only) >= EXPERIMENTS.keys()
        perform(task.module, lambda task=task: adapt(task, given.only, given.short), whole and not given.short)


if __name__ == "__main__":
    main()
