"""The main path on one screen: capture → find sites → plan → insert → initialize → activate → verify."""

from __future__ import annotations

from typing import TypeVar, overload

from torch import nn
from torch.export import ExportedProgram

from graphpeft.ambient import plain
from graphpeft.capturing.base_view import base_view
from graphpeft.capturing.capture import Inputs, as_module
from graphpeft.capturing.survey import capture_programs, find_sites
from graphpeft.passes import verify as checks
from graphpeft.passes.activate import activate
from graphpeft.passes.initialize import initialize
from graphpeft.passes.insert import insert
from graphpeft.passes.remove import undone_on_error
from graphpeft.passes.verify import Level
from graphpeft.planning.plan import make_plan
from graphpeft.rewrite.entry import on_model
from graphpeft.rewrite.naming import check_adaptable
from graphpeft.rules.rule import Rules, coerce, to_text
from graphpeft.tracing import as_pass

M = TypeVar("M", bound=nn.Module)


@overload
def apply(
    model: M,
    rules: Rules,
    *,
    inputs: Inputs = None,
    name: str = "default",
    seed: int = 0,
    expect: int | None = None,
    verify: Level = "fast",
) -> M: ...
@overload
def apply(
    model: ExportedProgram,
    rules: Rules,
    *,
    inputs: Inputs = None,
    name: str = "default",
    seed: int = 0,
    expect: int | None = None,
    verify: Level = "fast",
) -> nn.Module: ...


@as_pass("apply", "capture, find sites, plan, insert, initialize, activate and verify")
@plain()
@on_model(adds=True)
def apply(
    model: nn.Module | ExportedProgram,
    rules: Rules,
    *,
    inputs: Inputs = None,
    name: str = "default",
    seed: int = 0,
    expect: int | None = None,
    verify: Level = "fast",
) -> nn.Module:
    """Add an adapter to a model where the rules match its graph; returns the model, adapted in place.

    An `ExportedProgram` is first converted to a module, which shares its parameters and is returned. The base parameters
    are frozen, the new adapter trains, and previously active adapters become inactive (see `activate`).

    Args:
        rules: such as `"qv:rlora"` or `"qkvo[layers=0-7]:lora(r=8, alpha=16); mlp:lora"`.
        inputs: an example call; default: made from the model's config.
        name: the adapter's name; one model takes several.
        seed: with the site's name, it determines every random tensor.
        expect: the number of sites that the rules must match.
        verify: `"off"`, `"fast"` (no forward pass) or `"full"` (see `graphpeft.verify`).

    Raises: `RuleError`, `CaptureError`, `MatchError`, `AdapterError` or `VerifyError`; the model is then as it was.
    """
    asked = coerce(rules)
    module = as_module(model)
    check_adaptable(module, name)
    with base_view(module):
        captured = capture_programs(module, inputs)
        found = find_sites(captured)
    made = make_plan(module, found, asked, expect)
    made.warn()
    with undone_on_error(module, name):
        insert(module, name, to_text(asked), seed, made.entries, inputs)
        initialize(module, name)
        activate(module, name)
        checks.verify(module, inputs, verify, identity=True)
    return module
