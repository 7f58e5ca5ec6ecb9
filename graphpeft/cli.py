"""The command line: `graphpeft demo`, and a look at a model without loading its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import nn

import graphpeft as gp
from graphpeft import methods as known
from graphpeft.errors import CaptureError, GraphPeftError
from graphpeft.inspect.table import table

app = typer.Typer(
    help="Adapters for PyTorch models, inserted the way a compiler would.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Folder = Annotated[str, typer.Argument(help="A local model folder with a config.json.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the Python trace of an error.")]


@contextlib.contextmanager
def _one_line(debug: bool) -> Iterator[None]:
    """Errors of ours on standard error, without a trace unless it is asked for."""
    try:
        yield
    except GraphPeftError as error:
        if debug:
            raise
        Console(stderr=True, soft_wrap=True).print(f"[red]error[/red] {type(error).__name__}:", end=" ")
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error


def _skeleton(folder: str) -> nn.Module:
    """The folder's model on the meta device: its graph without its weights."""
    import transformers

    if not (Path(folder) / "config.json").is_file():
        raise CaptureError(
            f"{folder} has no config.json. Pass the folder of a transformers model, as save_pretrained writes it."
        )
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    name = (config.architectures or ["none"])[0]
    build = getattr(transformers, name, None)
    if build is None:
        raise CaptureError(f"{folder}/config.json names the architecture {name!r}, which transformers does not have.")
    with torch.device("meta"):
        model: nn.Module = build(config)
    return model


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where adapters, ONNX files and the plot go.")] = Path("graphpeft-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the split, the heads and the adapters.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few texts and steps: shows the path, not the accuracy.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Adapt a real pretrained MiniLM to real text twice, merge, export, and run both adapters on ONNX Runtime."""
    with _one_line(debug):
        from graphpeft.demo.run import main

        main(out, seed=seed, quick=quick)


@app.command()
def plan(
    model: Folder,
    rules: Annotated[str, typer.Argument(help="Such as 'qv:rlora; mlp:lora(r=8)'.")],
    debug: Debug = False,
) -> None:
    """Show what the rules would adapt: sites, methods, parameter counts."""
    with _one_line(debug):
        typer.echo(gp.plan(_skeleton(model), rules))


@app.command()
def sites(model: Folder, debug: Debug = False) -> None:
    """List every projection of a model and the role that its graph gives it."""
    with _one_line(debug):
        typer.echo(gp.sites(_skeleton(model)))


@app.command()
def methods() -> None:
    """List the adapter methods with their options and papers."""
    rows = []
    for name in known.names():
        cls = known.get(name)
        accepted = {o.name: o.accepts for o in known.options(cls)}
        given = ", ".join(f"{f.name}={f.default} ({accepted[f.name]})" for f in fields(cls))
        rows.append((name, given, cls.paper))
    typer.echo(table(("method", "options and defaults", "paper"), rows))


if __name__ == "__main__":
    app()
