"""Show the demo's figures on the terminal, as rich tables and progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

Results = Mapping[str, Any]


@contextmanager
def progress(console: Console, name: str, steps: int) -> Iterator[Callable[[float], None]]:
    """A progress bar over training steps; yields the function to call with the loss after each step."""
    columns = (
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.2f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=steps, loss=float("nan"))
        yield lambda loss: bar.update(task, advance=1, loss=loss)


def base(console: Console, results: Results) -> None:
    texts, areas = results["texts"], results["areas"]
    console.print(
        f"{texts['train']:,} docstrings of the standard library to train on, {texts['test']:,} others to test "
        f"on. Which of {len(areas)} areas does a text come from: {', '.join(areas)}?"
    )
    console.print(f"accuracy with the encoder frozen: [bold]{results['accuracy']:.1%}[/] (chance {1 / len(areas):.1%})")


def adapters(console: Console, results: Results) -> None:
    table = Table(title="Two adapters on one base", title_justify="left", box=SIMPLE)
    table.add_column("adapter")
    for column in ("trained", "of model", "file", "training", "accuracy", "points"):
        table.add_column(column, justify="right")
    table.add_row("none", "0", "", "", "", f"{results['accuracy']:.1%}", "")
    for name, run in results["adapters"].items():
        points = f"{100 * (run['accuracy'] - results['accuracy']):+.1f}"
        counts = f"{run['trainable']:,}", f"{run['share']:.2%}", _kilobytes(run["bytes"])
        table.add_row(name, *counts, f"{run['seconds']:.0f} s", f"{run['accuracy']:.1%}", points)
    console.print(table)


def merge(console: Console, results: Results) -> None:
    figures = results["merge"]
    console.print(
        f"{figures['adapter']} folded into the weights: logits differ by at most {figures['difference']:.1e}. "
        f"Un-merged: all {figures['tensors']} tensors are back, bit for bit."
    )


def onnx(console: Console, results: Results) -> None:
    table = Table(title="ONNX Runtime; the first three rows are one session", title_justify="left", box=SIMPLE)
    table.add_column("running")
    table.add_column("files")
    for column in ("size", "accuracy", "off PyTorch"):
        table.add_column(column, justify="right")
    for name, run in results["onnx"]["runs"].items():
        folder = "merged" if "merged" in name else "onnx"
        stem = f"{name}.onnx_adapter" if name in results["adapters"] else "model.onnx"
        size = sum(size for file, size in results["onnx"]["files"][folder].items() if file.startswith(stem))
        table.add_row(name, f"{folder}/{stem}", _kilobytes(size), f"{run['accuracy']:.1%}", f"{run['difference']:.0e}")
    console.print(table)


def files(console: Console, out: Path, results: Results) -> None:
    names = ", ".join(sorted(f"{path.name}/" if path.is_dir() else path.name for path in out.iterdir()))
    console.rule(f"[bold]Done in {results['seconds']:.0f} s", align="left")
    console.print(f"{out.resolve()}: {names}", soft_wrap=True)


def _kilobytes(size: int) -> str:
    return f"{size / 1000:,.0f} kB"
