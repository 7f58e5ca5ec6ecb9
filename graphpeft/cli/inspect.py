"""Commands that inspect adapters on a model: explain, diff, report, graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from graphpeft.cli import complete
from graphpeft.cli.shared import DONE, AsJson, Debug, Dump, Model, PrintAfter, SomeRules, adapted, at_work, command, say

Either = Annotated[
    str,
    typer.Argument(
        help="An .onnx file, an export's folder, a .json graph of `graphpeft graph`, or a model.",
        autocompletion=complete.models,
    ),
]


@command(DONE)
def explain(
    model: Model,
    adapter: Annotated[
        list[Path] | None, typer.Option("--adapter", "-a", help="A folder that gp.save wrote; repeatable.")
    ] = None,
    rules: SomeRules = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show adapters: their sites and ranks, the size of their updates, and the choices of their gates."""
    if not adapter and rules is None:
        raise typer.BadParameter("name saved adapters with --adapter, or give --rules.")
    with at_work(debug):
        import graphpeft as gp

        told = gp.explain(adapted(model, rules, adapter or ()))
    say(told, as_json)


@command(DONE)
def diff(
    before: Either,
    after: Annotated[
        str | None,
        typer.Argument(
            help="The graph to compare with; without it, --rules is required.", autocompletion=complete.models
        ),
    ] = None,
    rules: SomeRules = None,
    context: Annotated[int, typer.Option(help="Unchanged lines around a change.", min=0)] = 2,
    as_json: AsJson = False,
    print_after: PrintAfter = None,
    dump: Dump = None,
    debug: Debug = False,
) -> None:
    """Compare two graphs, or with --rules a model before and after adapting it."""
    if (after is None) == (rules is None):
        raise typer.BadParameter("name a second graph or give --rules, and not both.")
    with at_work(debug, print_after, dump):
        import graphpeft as gp

        pair = (_given(before), _given(after)) if after is not None else (adapted(before, rules),)
        changes = gp.diff(*pair, context=context)
    say(changes, as_json)


@command(DONE)
def report(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The .html file to write.")],
    rules: SomeRules = None,
    adapter: Annotated[
        list[Path] | None, typer.Option("--adapter", "-a", help="A folder that gp.save wrote; repeatable.")
    ] = None,
    print_after: PrintAfter = None,
    dump: Dump = None,
    debug: Debug = False,
) -> None:
    """Write a page about a model and its adapters. Weights are loaded only for saved adapters."""
    with at_work(debug, print_after, dump):
        import graphpeft as gp

        gp.report(adapted(model, rules, adapter or ()), out)
    say(f"{out}: written")


@command(DONE)
def graph(
    model: Either,
    out: Annotated[Path, typer.Argument(help="A .dot, .graphml or .json file to write.")],
    rules: SomeRules = None,
    print_after: PrintAfter = None,
    dump: Dump = None,
    debug: Debug = False,
) -> None:
    """Write a graph for Graphviz, yEd, Gephi or a script, with adapters marked."""
    with at_work(debug, print_after, dump):
        import graphpeft as gp
        from graphpeft.inspect.graph_files import write_graph

        made = gp.to_networkx(adapted(model, rules) if rules else _given(model))
        write_graph(made, out)
    say(f"{out}: {made.number_of_nodes()} nodes, {made.number_of_edges()} edges")


def _given(name: str) -> Any:
    """The object that a name refers to: the path of a graph, or a model."""
    path = Path(name)
    graph = path.suffix == ".onnx" or (path.suffix == ".json" and not _is_config(path)) or any(path.glob("*.onnx"))
    return path if graph else adapted(name)


def _is_config(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return isinstance(found, dict) and "model_type" in found
    except ValueError:
        return False
