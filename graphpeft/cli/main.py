"""The command line. Its commands run the demo, inspect a model, inspect adapters, and deploy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphpeft.cli import inspect as _inspect  # noqa: F401  # importing a module registers its commands
from graphpeft.cli import look as _look  # noqa: F401
from graphpeft.cli import ship as _ship  # noqa: F401
from graphpeft.cli.shared import COMMANDS, START, Debug, command, one_line

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"graphpeft {version('graphpeft')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Adapters for PyTorch models, inserted the way a compiler would."""


@command(START)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for adapters, ONNX files and the plot.")] = Path("graphpeft-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the data split, the heads and the adapters.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Use few texts and steps: shows the flow, not the accuracy.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train two adapters for a pretrained MiniLM on real text, merge, export, and run both on ONNX Runtime."""
    with one_line(debug):
        from graphpeft.demo.run import main

        main(out, seed=seed, quick=quick)


for panel, commands in COMMANDS.items():
    for one in commands:
        app.command(rich_help_panel=panel)(one)


if __name__ == "__main__":
    app()
