"""The command line: to see the path, to look at a model and at what was done to it, and to ship it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphpeft.cli import inspect as done
from graphpeft.cli import look, ship
from graphpeft.cli.shared import Debug, one_line

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


def demo(
    out: Annotated[Path, typer.Option(help="Where adapters, ONNX files and the plot go.")] = Path("graphpeft-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the split, the heads and the adapters.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few texts and steps: shows the path, not the accuracy.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Adapt a real pretrained MiniLM to real text twice, merge, export, and run both adapters on ONNX Runtime."""
    with one_line(debug):
        from graphpeft.demo.run import main

        main(out, seed=seed, quick=quick)


PANELS = {
    "Start": (demo,),
    "Look at a model": (look.plan, look.sites, look.roles, look.methods, look.why),
    "Look at what was done": (done.explain, done.diff, done.report, done.graph),
    "Ship": (ship.merge, ship.export, ship.doctor, ship.run),
}
for panel, commands in PANELS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)


if __name__ == "__main__":
    app()
