"""`graphpeft demo` as a list of steps: base model, two adapters, merge, export, ONNX Runtime."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console

import graphpeft as gp
from graphpeft.demo import show
from graphpeft.demo.model import require
from graphpeft.demo.plot import plot_losses
from graphpeft.demo.steps import QUICK, RECIPES, Size, adapt, fold, prepare, ship


def main(out: Path, seed: int = 0, quick: bool = False, console: Console | None = None) -> None:
    """Train two adapters on a real encoder and real text, merge one, export both, and write all files to `out`.

    `out` gets the adapters (`rlora`, `lora`), the exported models (`onnx`, `merged`), `loss.png`,
    `results.json`, and `explain.txt`, a table of every adapted weight.
    `quick` uses few texts and one epoch: it tests the flow, not the methods.

    Raises:
        DemoPackageError: the pretrained encoder or matplotlib is not installed.
        CorpusError: the sources of the standard library are missing.
    """
    start = time.perf_counter()
    console, size = console or Console(), QUICK if quick else Size()
    require("matplotlib")
    out.mkdir(parents=True, exist_ok=True)
    with step(console, "Base: pretrained MiniLM, and a linear head on its frozen features"):
        task = prepare(size, seed)
        show.base(console, task.results)
    losses = {}
    for recipe in RECIPES:
        with step(console, f'Adapter {recipe.name}: gp.apply(model, "{recipe.rules}")'):
            losses[recipe.name] = adapt(task, recipe, size, seed, out / recipe.name, partial(show.progress, console))
    show.adapters(console, task.results)
    (out / "explain.txt").write_text(f"{gp.explain(task.model)}\n", encoding="utf-8")
    with step(console, "Merge and back: gp.merge(model), gp.unmerge(model)"):
        task.results["merge"] = fold(task)
        show.merge(console, task.results)
    with step(console, "ONNX Runtime: gp.export(model, folder), gp.Session(folder)"):
        task.results["onnx"] = ship(task, out)
        show.onnx(console, task.results)
    plot_losses(losses, size.epochs, out / "loss.png")
    task.results |= {"losses": losses, "seconds": round(time.perf_counter() - start, 1)}
    (out / "results.json").write_text(json.dumps(task.results, indent=1) + "\n", encoding="utf-8")
    show.files(console, out, task.results)


@contextmanager
def step(console: Console, title: str) -> Iterator[None]:
    """Print a heading before a step, and its time after it."""
    console.rule(f"[bold]{title}", align="left")
    start = time.perf_counter()
    yield
    console.print(f"[dim]{time.perf_counter() - start:.1f} s")
