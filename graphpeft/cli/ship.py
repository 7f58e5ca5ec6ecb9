"""Commands that deploy a model: merge, export, doctor, run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from graphpeft.cli import complete
from graphpeft.cli.shared import SHIP, AsJson, Debug, Dump, PrintAfter, at_work, command, one_line, say

Folder = Annotated[Path, typer.Argument(help="A folder that export wrote.")]


@command(SHIP)
def merge(
    base: Annotated[Path, typer.Argument(help="A local folder of a transformers model, in safetensors.")],
    adapters: Annotated[list[Path], typer.Argument(help="Folders that gp.save wrote, folded in this order.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    any_base: Annotated[bool, typer.Option("--any-base", help="Only warn if an adapter had another base.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Fold adapters into a checkpoint on disk, one weight in memory at a time. After a kill, run it again to continue."""
    with at_work(debug):
        from graphpeft.store.merge_files import merge_files

        done = merge_files(base, adapters, out, any_base=any_base)
    say(asdict(done) | {"out": str(done.out)} if as_json else done, as_json)


@command(SHIP)
def export(
    model: Annotated[str, typer.Argument(help="A local folder of a transformers model, with weights.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    adapter: Annotated[list[Path], typer.Option("--adapter", "-a", help="A folder that gp.save wrote; repeatable.")],
    merged: Annotated[bool, typer.Option("--merged", help="Fold the adapters into the weights.")] = False,
    per_row: Annotated[
        bool, typer.Option("--per-row", "--rows", help="Allow a different adapter for each row of a batch.")
    ] = False,
    compact: Annotated[
        bool, typer.Option("--compact", help="Make the method's own tensors inputs, instead of LoRA pairs.")
    ] = False,
    quantize: Annotated[str | None, typer.Option(help="Quantize the base's weights: int4 or int8.")] = None,
    accuracy_level: Annotated[
        int, typer.Option(help="For int4 products: 4 rounds activations to 8 bits, 0 does not.")
    ] = 4,
    opset: Annotated[int, typer.Option(help="ONNX opset; use a lower one for older runtimes.")] = 23,
    verify: Annotated[str, typer.Option(help="Checks to run: off, fast or full.")] = "full",
    as_json: AsJson = False,
    print_after: PrintAfter = None,
    dump: Dump = None,
    debug: Debug = False,
) -> None:
    """Write a model with adapters for ONNX Runtime, and check it against PyTorch."""
    options = dict(merged=merged, per_row=per_row, compact=compact, quantize=quantize, accuracy_level=accuracy_level)
    options |= dict(opset=opset, verify=verify)
    with at_work(debug, print_after, dump):
        from graphpeft.cli.deploy import ship

        report = ship(model, adapter, out, **options)
    say(asdict(report) if as_json else report, as_json)


@command(SHIP)
def doctor(
    folder: Folder,
    adapter: Annotated[Path | None, typer.Argument(help="An .onnx_adapter file; default: all in the folder.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check that an exported folder is complete and that its adapters, or one adapter, fit; if not, say where and why."""
    with one_line(debug):
        from graphpeft.runtime.doctor import doctor as look

        findings = look(folder, adapter)
    lines = [f"{'ok   ' if one.good else 'WRONG'} {one.about}: {one.text}" for one in findings]
    say([asdict(one) for one in findings] if as_json else "\n".join(lines), as_json)
    if not all(one.good for one in findings):
        raise typer.Exit(1)


@command(SHIP)
def run(
    folder: Folder,
    text: Annotated[str, typer.Argument(help="A prompt, or a text to encode or classify.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", help="NAME, or NAME=STRENGTH; repeatable.", autocompletion=complete.adapters),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Maximum number of new tokens.")] = 40,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed for sampling tokens.")] = None,
    debug: Debug = False,
) -> None:
    """Run an exported folder on a text, with none, one or several adapters."""
    with one_line(debug):
        from graphpeft.cli.deploy import answer

        told = answer(folder, text, adapter or [], tokens, temperature=temperature, seed=seed)
    say(told)
