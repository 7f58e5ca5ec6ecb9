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


Folder = Annotated[Path, typer.Argument(help="What export wrote.")]


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A local folder of a transformers model, with weights.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    adapter: Annotated[list[Path], typer.Option("--adapter", "-a", help="A folder that gp.save wrote; repeatable.")],
    merged: Annotated[bool, typer.Option("--merged", help="Fold the adapters into the weights.")] = False,
    rows: Annotated[bool, typer.Option("--rows", help="Allow another adapter for each row of a batch.")] = False,
    compact: Annotated[bool, typer.Option("--compact", help="Keep what the method trains in its own shapes.")] = False,
    quantize: Annotated[str | None, typer.Option(help="int4 or int8, for the base's weights.")] = None,
    opset: Annotated[int | None, typer.Option(help="Of ONNX; default: that of torch.onnx.")] = None,
    verify: Annotated[str, typer.Option(help="off, fast or full.")] = "full",
    debug: Debug = False,
) -> None:
    """Write a model with adapters for ONNX Runtime, and check it against PyTorch."""
    with _one_line(debug):
        from graphpeft.shipping import ship

        options = dict(merged=merged, rows=rows, compact=compact, quantize=quantize, opset=opset, verify=verify)
        with Console(stderr=True).status(f"exporting {model}"):
            report = ship(model, adapter, out, **options)
        typer.echo(report)


@app.command()
def doctor(
    folder: Folder,
    adapter: Annotated[Path | None, typer.Argument(help="An .onnx_adapter file; default: all in the folder.")] = None,
    debug: Debug = False,
) -> None:
    """Say whether an exported folder is whole and an adapter fits it; if not, where and why."""
    with _one_line(debug):
        from graphpeft.doctor import doctor as look

        findings = look(folder, adapter)
        for one in findings:
            typer.echo(f"{'ok   ' if one.good else 'WRONG'} {one.about}: {one.text}")
    if not all(one.good for one in findings):
        raise typer.Exit(1)


@app.command()
def run(
    folder: Folder,
    text: Annotated[str, typer.Argument(help="A prompt, or a text to encode or classify.")],
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", "-a", help="NAME, or NAME=STRENGTH; repeatable.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="At most this many new tokens.")] = 40,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of the tokens that are drawn.")] = None,
    debug: Debug = False,
) -> None:
    """Run an exported folder on a text, with no, one or several adapters."""
    with _one_line(debug):
        from graphpeft.shipping import answer

        typer.echo(answer(folder, text, adapter or [], tokens, temperature=temperature, seed=seed))


if __name__ == "__main__":
    app()
