"""Commands that inspect a model without loading its weights: plan, sites, roles, methods, why."""

from __future__ import annotations

from typing import Annotated

import typer

from graphpeft.cli.shared import LOOK, AsJson, Debug, Dump, Model, PrintAfter, Rules, SomeRules, at_work, command, say


@command(LOOK)
def plan(
    model: Model,
    rules: Rules,
    as_json: AsJson = False,
    print_after: PrintAfter = None,
    dump: Dump = None,
    debug: Debug = False,
) -> None:
    """Show what the rules would adapt: sites, methods, parameter counts."""
    with at_work(debug, print_after, dump):
        import graphpeft as gp
        from graphpeft.capturing.skeleton import skeleton

        made = gp.plan(skeleton(model), rules)
    say(made, as_json)


@command(LOOK)
def sites(
    model: Model, as_json: AsJson = False, print_after: PrintAfter = None, dump: Dump = None, debug: Debug = False
) -> None:
    """List every projection of a model with its role."""
    with at_work(debug, print_after, dump):
        import graphpeft as gp
        from graphpeft.capturing.skeleton import skeleton

        found = gp.sites(skeleton(model))
    say(found, as_json)


@command(LOOK)
def roles(
    model: Model, as_json: AsJson = False, print_after: PrintAfter = None, dump: Dump = None, debug: Debug = False
) -> None:
    """Show the roles that a model has, why it lacks the others, and the parts that no example call reaches."""
    with at_work(debug, print_after, dump):
        from graphpeft.capturing.skeleton import skeleton
        from graphpeft.capturing.survey import find_base_sites
        from graphpeft.inspect.roles import overview

        built = skeleton(model)
        found = overview(built, find_base_sites(built))
    say(found, as_json)


@command(LOOK)
def methods(
    model: Annotated[str | None, typer.Argument(help="Count what each method would train on this model.")] = None,
    target: Annotated[str, typer.Option(help="The sites to count at, as in a rule.")] = "qv",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the adapter methods: chain, trained parameters, whether they lower to LoRA, paper, options."""
    with at_work(debug):
        from graphpeft.capturing.skeleton import skeleton
        from graphpeft.capturing.survey import find_base_sites
        from graphpeft.inspect.methods import methods as described

        built = skeleton(model) if model else None
        found = (built, find_base_sites(built)) if built is not None else None
        told = described(found, target)
    say(told, as_json)


@command(LOOK)
def why(
    model: Model,
    path: Annotated[str, typer.Argument(help="A module or weight, such as model.layers.0.mlp.up_proj.")],
    rules: SomeRules = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Explain why a layer has an adapter or none: its role, the rules, and the pattern that came nearest."""
    with at_work(debug):
        import graphpeft as gp
        from graphpeft.capturing.skeleton import skeleton

        answer = gp.why(skeleton(model), path, rules)
    say(answer, as_json)
