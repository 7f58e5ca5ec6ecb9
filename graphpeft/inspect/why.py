"""Explain why a weight has an adapter or none: its role in the graph, and the outcome of each rule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from graphpeft.capturing.capture import Inputs, as_module
from graphpeft.capturing.survey import find_base_sites
from graphpeft.errors import MatchError
from graphpeft.ir.layers import any_layer, layer_of
from graphpeft.ir.site import Site
from graphpeft.ir.source import code_of, location, runner
from graphpeft.match.find import SearchResult
from graphpeft.match.products import op
from graphpeft.planning.absence import absences
from graphpeft.rewrite.entry import on_model
from graphpeft.rewrite.state import example, find_state
from graphpeft.rewrite.sync import inactive
from graphpeft.rules.rule import Rule, coerce, fits
from graphpeft.show.folding import any_outside, collapse_layers, layers_text
from graphpeft.show.sites import role_text, rows_text
from graphpeft.show.view import Grid, View


@dataclass(frozen=True)
class Reason:
    """The explanation for one weight, or for equal weights in several layers."""

    weight: str
    """Its name, with `*` for the layer's number if it stands for several layers."""
    shape: tuple[int, ...]
    role: str
    """Its role and the rows with that role; empty if it is not a projection."""
    place: str
    """Location and text of the line in the model's code that uses it."""
    adapters: tuple[str, ...]
    """The adapters on it."""
    because: tuple[str, ...]
    """The outcome of each rule, or why no rule can match it."""
    remedy: str
    """A rule that would match it."""
    layers: tuple[int | None, ...] = ()


@dataclass(frozen=True)
class Why(View):
    """One explanation per kind of weight. Prints as paragraphs."""

    reasons: tuple[Reason, ...]

    def blocks(self) -> Iterator[Grid | str]:
        for number, one in enumerate(self.reasons):
            size = " × ".join(map(str, one.shape))
            lines = [f"{one.weight}  {size}  {layers_text(one.layers) if len(one.layers) > 1 else ''}".rstrip()]
            told = {"role": [one.role], "used at": [one.place], "adapters": [", ".join(one.adapters) or "none"]}
            told |= {"because": list(one.because), "to adapt it": [one.remedy]}
            for title, texts in told.items():
                shown = [line for text in texts if text for line in text.split("\n")]
                lines += [f"  {title if not i else '':12}{text}" for i, text in enumerate(shown)]
            yield ("\n" if number else "") + "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for `json.dumps`."""
        return asdict(self)


@on_model()
def why(model: nn.Module | ExportedProgram, path: str, rules: Any = None, *, inputs: Inputs = None) -> Why:
    """Explain why a weight has an adapter or none.

    Args:
        model: a model with or without adapters.
        path: a weight's or module's name, such as `model.layers.3.mlp.up_proj`, or a glob such as `*.up_proj`.
        rules: rules as for `apply`; default: the rules of the model's adapters.
        inputs: an example call; default: made from the model's config.

    Raises: `MatchError` if the model has no weight of such a name, with the nearest names; `RuleError`, `CaptureError`.
    """
    module = as_module(model)
    state = find_state(module)
    on = state.adapters if state is not None else {}
    asked = coerce(rules) if rules is not None else tuple(r for adapter in on.values() for r in coerce(adapter.rules))
    with inactive(module, attached=False):
        names = [name for name, p in module.named_parameters(remove_duplicate=False) if p.dim() > 1]
        meant = [name for name in names if fits(path, name) or name.startswith(f"{path}.")]
        if not meant:
            near = get_close_matches(path, [*names, *(name.rpartition(".")[0] for name in names)], 3, 0.3)
            raise MatchError(
                f"{type(module).__name__} has no weight matrix {path!r}; vectors, such as those of norms, take no adapter. "
                f"Near it: {', '.join(near) or 'nothing'}. A glob such as '*.q_proj' means a weight in every layer."
            )
        found = find_base_sites(module, example(module, inputs))
        work = _Reasons(module, found, asked)
        items = [(one, layer_of(name)) for name in meant for one in work.of(name, on)]
    grouped = collapse_layers((replace(one, weight=any_layer(one.weight)), layer) for one, layer in items)
    return Why(tuple(_named(one, layers) for one, layers in grouped))


def _named(one: Reason, layers: Sequence[int | None]) -> Reason:
    name = one.weight.replace("*", str(layers[0]), 1) if len(layers) == 1 and layers[0] is not None else one.weight
    return replace(one, weight=name, layers=tuple(layers))


class _Reasons:
    def __init__(self, model: nn.Module, found: SearchResult, rules: Sequence[Rule]) -> None:
        self.model, self.found, self.rules = model, found, rules
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        self.tied = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
        self.users: dict[int, fx.Node] = {}
        self.places: dict[int, tuple[str, str]] = {}
        for part, program in found.programs.items():
            for node, name in program.weights.items():
                if node.users:
                    key, user = self.tied[f"{part}.{name}" if part else name], next(iter(node.users))
                    owner = runner(user, program.model)
                    self.users.setdefault(key, user)
                    self.places.setdefault(key, (location(user, owner), code_of(user, owner)))

    def of(self, name: str, adapters: dict[str, Any]) -> Iterator[Reason]:
        """One reason for each role of the weight or of some of its rows."""
        sites = [s for s in self.found.sites if self.tied[s.weight] == self.tied[name]]
        for site in sites:
            on = [n for n, a in adapters.items() if any(e.site.key == site.key for e in a.entries)]
            said = [self._said(rule, site) for rule in self.rules] or [
                "no rules were given, and no adapter is on the model"
            ]
            rows = "" if site.rows is None else f", rows {rows_text(site.rows)}"
            role = "none: a projection that no declared role fits" if site.role == "other" else role_text(site) + rows
            taken = on or any(rule.selects(site) is None for rule in self.rules)
            yield self._reason(name, role, tuple(on), tuple(said), "" if taken else self._remedy(name, site))
        if not sites:
            yield self._reason(name, "", (), (self._unused(name),), "")

    def _reason(self, name: str, role: str, on: tuple[str, ...], said: tuple[str, ...], remedy: str) -> Reason:
        place, code = self.places.get(self.tied[name], ("", ""))
        return Reason(name, self.shapes[name], role, f"{place}   {code}".strip(), on, said, remedy)

    def _said(self, rule: Rule, site: Site) -> str:
        reason = rule.selects(site)
        if reason is None:
            return f"`{rule}` takes it"
        if any(rule.names(place) for place in (site, *site.tied)):
            return f"`{rule}` leaves it out: " + any_outside(reason)
        if site.role == "other" and rule.glob is None:
            missing = absences(self.model, self.found, rule.roles)
            return "\n".join([f"`{rule}` asks for roles, and it has none", *(f"  {each}" for each in missing)])
        return f"`{rule}` is not for it: it asks for {rule.glob or ', '.join(rule.roles)}"

    def _remedy(self, name: str, site: Site) -> str:
        for rule in self.rules:
            if any(rule.names(place) for place in (site, *site.tied)):
                return str(replace(rule, layers=None, cross=None))
        method = self.rules[0].method.text(self.rules[0].options) if self.rules else "lora"
        target = f"path({any_layer(name)})" if site.role == "other" else site.role
        return f"{target}:{method}"

    def _unused(self, name: str) -> str:
        node = self.users.get(self.tied[name])
        if node is not None:
            return f"the graph uses it in `{op(node)}`, where it multiplies no activation and no token picks its rows"
        for part, reason in self.found.unreached.items():
            if f"{name}.".startswith(f"{part}." if part else ""):
                return f"{part or 'the model'} could not be captured: {reason.strip().splitlines()[0]}"
        return "no example call runs it; give one with inputs="
