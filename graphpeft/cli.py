"""The command line: `graphpeft demo`, and a look at a model without loading its weights."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import graphpeft as gp
from graphpeft.apply import found_in
from graphpeft.errors import GraphPeftError
from graphpeft.inspect.methods import methods_text
from graphpeft.inspect.roles import overview
from graphpeft.samples import settled
from graphpeft.skeleton import skeleton
from graphpeft.survey import survey

app = typer.Typer(
    help="Adapters for PyTorch models, inserted the way a compiler would.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Model = Annotated[
    str, typer.Argument(help="A local model folder, a config.json, or a model type of transformers such as llama.")
]
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
    model: Model,
    rules: Annotated[str, typer.Argument(help="Such as 'qv:rlora; mlp:lora(r=8)'.")],
    debug: Debug = False,
) -> None:
    """Show what the rules would adapt: sites, methods, parameter counts."""
    with _one_line(debug):
        typer.echo(gp.plan(skeleton(model), rules))


@app.command()
def sites(model: Model, debug: Debug = False) -> None:
    """List every projection of a model and the role that its graph gives it."""
    with _one_line(debug):
        typer.echo(gp.sites(skeleton(model)))


@app.command()
def roles(
    model: Model,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
    debug: Debug = False,
) -> None:
    """Show what a model has of each role, why it lacks the others, and what no example call reaches."""
    with _one_line(debug):
        built = skeleton(model)
        with settled(built):
            found = overview(built, survey(built))
        typer.echo(json.dumps(found.as_dict(), indent=2) if as_json else found)


@app.command()
def methods(
    model: Annotated[str | None, typer.Argument(help="Count what each method would train on this model.")] = None,
    target: Annotated[str, typer.Option(help="Where, as in a rule.")] = "qv",
    debug: Debug = False,
) -> None:
    """List the adapter methods: chain, trained numbers, whether they lower to LoRA, paper, options."""
    with _one_line(debug):
        built = skeleton(model) if model else None
        typer.echo(methods_text((built, found_in(built)) if built is not None else None, target))


if __name__ == "__main__":
    app()
