"""`gp.plan`: show what `gp.apply` would do."""

from __future__ import annotations

from torch import nn
from torch.export import ExportedProgram

from graphpeft.ambient import plain
from graphpeft.capturing.capture import Inputs, as_module
from graphpeft.capturing.survey import find_base_sites
from graphpeft.planning.plan import Plan, make_plan
from graphpeft.rewrite.entry import on_model
from graphpeft.rules.rule import Rules, coerce


@plain()
@on_model()
def plan(
    model: nn.Module | ExportedProgram,
    rules: Rules,
    *,
    inputs: Inputs = None,
    expect: int | None = None,
    fold: bool = True,
) -> Plan:
    """What `apply` would do: a table of sites, methods and parameter counts, and the outcome of each rule.

    Equal layers print as one line unless `fold` is false. Changes nothing; raises the errors of `apply`.
    """
    module = as_module(model)
    return make_plan(module, find_base_sites(module, inputs), coerce(rules), expect, fold)
