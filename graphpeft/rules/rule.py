"""Rules say which weights get which method: `target[qualifiers]:method(options)`, joined by `;`.

    qv:rlora(r=256); mlp:lora(r=8)
    qkvo[layers=0-7]:lora(r=8, alpha=16)
    q[cross]:lora
    experts.down+router:lora
    path(*.in_proj):lora

A target is a role, a run of the letters q k v o, an alias (`attn`, `mlp`, `linear`, `experts`, `mixer`), several of
these joined by `+`, or `path(glob)` on the weight's qualified name, with or without its last component. Qualifiers
are `layers=` with inclusive ranges, `cross` and `self`. A tied weight answers to all its roles and names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from graphpeft.ir.site import Site
from graphpeft.methods import Method
from graphpeft.rules.syntax import Ranges, expand, path_glob, read


@dataclass(frozen=True)
class Rule:
    """Which weights get which method. Prints as the text that `parse` reads."""

    target: str
    """As written before the qualifiers: `qv`, `attn+down`, `path(*.in_proj)`."""
    method: Method
    layers: Ranges | None = None
    """Inclusive ranges of layer indices, or `None` for all layers."""
    cross: bool | None = None
    """True for cross-attention only, False for everything else, `None` for both."""
    options: tuple[str, ...] = field(default=(), compare=False)
    """The method's options that the text named, which are printed even where they equal the default."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that the target means; none for a `path(...)`."""
        return expand(self.target)

    @property
    def glob(self) -> str | None:
        """The pattern of a `path(...)` target."""
        return path_glob(self.target)

    def selects(self, site: Site) -> str | None:
        """`None` if the rule selects the site, otherwise the reason why it does not."""
        places = (site, *site.tied)
        named = [place for place in places if self.names(place)]
        if not named:
            roles = "+".join(dict.fromkeys(place.role for place in places))
            return f"role {roles}" if self.glob is None else f"path not like {self.glob}"
        reasons = [self._declines(place) for place in named]
        return None if None in reasons else reasons[0]

    def names(self, place: Site) -> bool:
        """Whether the target, without the qualifiers, names this place of a weight."""
        return place.role in self.roles if self.glob is None else fits(self.glob, place.weight)

    def _declines(self, place: Site) -> str | None:
        """Why the qualifiers exclude a place that the target names."""
        if self.layers is not None and place.layer is None:
            return "not in a layer"
        if self.layers is not None and not any(place.layer in range(first, last + 1) for first, last in self.layers):
            return f"layer {place.layer} outside {_ranges(self.layers)}"
        if self.cross is not None and place.cross != self.cross:
            return "cross-attention" if place.cross else "not cross-attention"
        return None

    def __str__(self) -> str:
        qualifiers = [f"layers={_ranges(self.layers)}"] if self.layers is not None else []
        if self.cross is not None:
            qualifiers.append("cross" if self.cross else "self")
        where = f"[{', '.join(qualifiers)}]" if qualifiers else ""
        return f"{self.target}{where}:{self.method.text(self.options)}"


def parse(text: str, roles: Iterable[str] = ()) -> tuple[Rule, ...]:
    """The rules in a text. `roles` names roles that exist besides the declared ones.

    Raises `RuleError`, which marks the place with a caret and says what would be accepted there.
    """
    return tuple(Rule(*parts) for parts in read(text, roles))


Rules = str | Rule | Iterable[Rule | str] | Mapping[str, Method | str]
"""Rules in any of the forms that the public functions accept; a mapping goes from target to method."""


def coerce(rules: Rules, roles: Iterable[str] = ()) -> tuple[Rule, ...]:
    """Parsed rules from any of their forms.

    Raises `RuleError` as `parse` does: rules made in Python are checked like written ones.
    """
    if isinstance(rules, str):
        return parse(rules, roles)
    if isinstance(rules, Rule):
        return parse(str(rules), roles)
    if isinstance(rules, Mapping):
        rules = [f"{target}:{method}" for target, method in rules.items()]
    return parse("; ".join(str(rule).strip().rstrip(";") for rule in rules), roles)


def to_text(rules: Iterable[Rule]) -> str:
    """All rules as one text, which `parse` reads back."""
    return "; ".join(map(str, rules))


def fits(glob: str, weight: str) -> bool:
    """Whether a `path(...)` pattern matches a weight: its qualified name, or its module's."""
    return any(fnmatchcase(name, glob) for name in (weight, weight.rpartition(".")[0]))


def _ranges(layers: Ranges) -> str:
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in layers)
