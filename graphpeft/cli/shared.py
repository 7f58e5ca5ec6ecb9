"""Code shared by the commands: options, one-line errors, watching passes, and results as text or JSON.

Commands import the code they run inside their functions, so that help and completion do not wait for torch.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from graphpeft.cli import complete
from graphpeft.errors import GraphPeftError

if TYPE_CHECKING:
    from torch import nn

Model = Annotated[
    str,
    typer.Argument(
        help="A local model folder, a config.json, or a model type of transformers such as llama.",
        autocompletion=complete.models,
    ),
]
Rules = Annotated[
    str,
    typer.Argument(help="Rules, such as 'qv:rlora; mlp:lora(r=4)'.", autocompletion=complete.rules, show_default=False),
]
SomeRules = Annotated[
    str | None,
    typer.Option("--rules", "-r", help="Adapt the model first, as in 'qv:lora'.", autocompletion=complete.rules),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the Python trace of an error.")]
PrintAfter = Annotated[
    list[str] | None,
    typer.Option(
        "--print-after",
        metavar="PASS",
        help="Print the graph after this pass, or after all, to standard error; repeatable.",
        autocompletion=complete.passes,
    ),
]
Dump = Annotated[
    Path | None,
    typer.Option("--dump", metavar="DIR", help="Write every pass's graph before and after, and a table, to a folder."),
]

C = TypeVar("C", bound=Callable[..., None])
START, LOOK, DONE, SHIP = "Start", "Look at a model", "Look at what was done", "Ship"
COMMANDS: dict[str, list[Callable[..., None]]] = {panel: [] for panel in (START, LOOK, DONE, SHIP)}
"""Commands by their panel in `--help`."""


def command(panel: str) -> Callable[[C], C]:
    """Decorator: register a function as a command. Its docstring is the help, its annotations are the options."""

    def register(function: C) -> C:
        COMMANDS[panel].append(function)
        return function

    return register


@contextlib.contextmanager
def one_line(debug: bool) -> Iterator[None]:
    """Print graphpeft's errors and file errors on one line of standard error; `debug` shows the trace instead."""
    try:
        yield
    except BrokenPipeError:  # for example, from `| head`
        raise
    except (GraphPeftError, OSError) as error:
        if debug:
            raise
        from rich.console import Console

        Console(stderr=True, soft_wrap=True).print(f"[red]error[/red] {type(error).__name__}:", end=" ")
        typer.echo(_file_text(error) if isinstance(error, OSError) else str(error), err=True)
        raise typer.Exit(1) from error


def _file_text(error: OSError) -> str:
    if error.filename is None:
        return str(error)
    return f"{error.filename}: {error.strerror}. Check the path, and whether it may be read or written."


@contextlib.contextmanager
def at_work(debug: bool, print_after: Sequence[str] | None = None, dump: Path | None = None) -> Iterator[None]:
    """A context for running passes: one-line errors, progress on standard error, and the requested dumps."""
    with one_line(debug):
        from graphpeft.inspect.watch import watch

        with watch(dump, print_after or (), progress=True):
            yield


def say(result: Any, as_json: bool = False) -> None:
    """Print a result, in color on a terminal; with `as_json` as JSON, from its `as_dict` or as plain values."""
    if as_json:
        plain = result.as_dict() if hasattr(result, "as_dict") else result
        typer.echo(json.dumps(plain, indent=2, ensure_ascii=False))
    elif hasattr(result, "__rich_console__") and sys.stdout.isatty():
        from rich.console import Console

        Console(width=400).print(result)  # at the terminal's width, tables would cut off the ends of names
    else:
        typer.echo(result)


def adapted(model: str, rules: str | None = None, adapters: Sequence[Path] = ()) -> nn.Module:
    """A model adapted by rules or with saved adapters. Its weights are loaded only for saved adapters."""
    import graphpeft as gp
    from graphpeft.capturing.skeleton import pretrained, skeleton

    built = pretrained(model) if adapters else skeleton(model)
    for folder in adapters:
        gp.load(built, folder)
    return gp.apply(built, rules) if rules else built
