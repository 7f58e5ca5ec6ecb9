"""The main path on one screen: capture → normalize → find sites → plan → insert → initialize → verify."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from torch import nn
from torch.export import ExportedProgram

from graphpeft.ambient import plain
from graphpeft.capture.capture import Inputs, as_module
from graphpeft.capture.samples import settled
from graphpeft.inspect.table import names_text, role_text, rows_text, site_dict, size_text
from graphpeft.inspect.view import Grid, View
from graphpeft.match.find import Found
from graphpeft.methods import Method
from graphpeft.passes import verify as checks
from graphpeft.passes.activate import remove
from graphpeft.passes.initialize import initialize
from graphpeft.passes.insert import check_name, insert
from graphpeft.passes.verify import Level
from graphpeft.plan import Plan, make_plan
from graphpeft.program import Site
from graphpeft.quantized import refuse_cut
from graphpeft.rules import Rule, coerce, to_text
from graphpeft.state import hidden, inactive, set_active
from graphpeft.steps import named, step
from graphpeft.survey import survey

Rules = str | Rule | Iterable[Rule | str] | Mapping[str, Method | str]


@named("apply")
@plain()
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

    An `ExportedProgram` is turned into a module first, which is returned; it shares the program's parameters. The base
    parameters are frozen, the new adapter trains, and adapters that were active before rest (see `activate`).

    Args:
        rules: such as `"qv:rlora"` or `"qkvo[layers=0-7]:lora(r=8, alpha=16); mlp:lora"`.
        inputs: an example call, if none can be made from the model's config.
        name: the adapter's name; one model takes several.
        seed: with the site's name, it determines every random tensor.
        expect: the number of sites that the rules have to match.
        verify: `"off"`, `"fast"` (no forward pass) or `"full"` (see `graphpeft.verify`).

    Raises: `RuleError`, `CaptureError`, `MatchError`, `AdapterError`, `VerifyError`; the model is then as it was.
    """
    parsed = coerce(rules)
    module = as_module(model) if isinstance(model, ExportedProgram) else model
    check_name(module, name)
    refuse_cut(module)
    made = make_plan(module, found_in(module, inputs), parsed, expect)
    state = insert(module, name, to_text(parsed), seed, made.entries)
    state.inputs = state.inputs if inputs is None else inputs
    before = state.active
    try:
        initialize(module, name)
        with step("activate", module):
            set_active(module, (name,))
        checks.verify(module, inputs, verify, identity=True)
    except BaseException:
        remove(module, name)
        if before:
            set_active(module, before)
        raise
    return module


def found_in(module: nn.Module, inputs: Inputs = None) -> Found:
    """Every site of a model, and what was not found. Adapters rest meanwhile."""
    with inactive(module), hidden(module), settled(module):
        return survey(module, inputs)


@plain()
def plan(
    model: nn.Module | ExportedProgram,
    rules: Rules,
    *,
    inputs: Inputs = None,
    expect: int | None = None,
    fold: bool = True,
) -> Plan:
    """What `apply` would do: a table of sites, methods and parameter counts, and what became of each rule.

    Equal layers print as one line unless `fold` is false. Changes nothing; raises as `apply` does.
    """
    module = as_module(model) if isinstance(model, ExportedProgram) else model
    return make_plan(module, found_in(module, inputs), coerce(rules), expect, fold)


@dataclass(frozen=True)
class Sites(View, Sequence[Site]):
    """Sites in graph order; prints as a table."""

    items: tuple[Site, ...]
    unreached: Mapping[str, str] = field(default_factory=dict)
    """Parts of the model that no example call ran, so that nothing is known of them, and why."""

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> Sites: ...
    def __getitem__(self, index: int | slice) -> Site | Sites:
        return Sites(self.items[index], self.unreached) if isinstance(index, slice) else self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.items)

    def blocks(self) -> Iterator[Grid | str]:
        rows = [
            (role_text(s), names_text(s), rows_text(s.rows), size_text(s),
             "" if s.layer is None else s.layer, s.form, s.source)
            for s in self.items
        ]  # fmt: skip
        yield Grid.of(("role", "weight", "rows", "out × in", "layer", "form", "source"), rows)
        yield from (f"not reached: {path or 'the whole'}: {why}" for path, why in self.unreached.items())

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for `json.dumps`."""
        return {"sites": [site_dict(site) for site in self.items], "unreached": dict(self.unreached)}


@plain()
def sites(model: nn.Module | ExportedProgram, inputs: Inputs = None) -> Sites:
    """Every projection of the model and the role that its graph gives it. Raises `CaptureError`."""
    module = as_module(model) if isinstance(model, ExportedProgram) else model
    found = found_in(module, inputs)
    return Sites(found.sites, found.unreached)


def trainable(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters of a model; a tensor that is shared counts once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, required in sizes if required), sum(n for n, _ in sizes)
