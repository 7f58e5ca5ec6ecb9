"""Rules say which weights get which method: `target[qualifiers]:method(options)`, joined by `;`.

    qv:rlora(r=256); mlp:lora(r=8)
    qkvo[layers=0-7]:lora(r=8, alpha=16)
    q[cross]:lora
    path(*.in_proj):lora

A target is a role, a run of the letters q k v o, an alias (`attn`, `mlp`, `linear`), several of these joined by
`+`, or `path(glob)` on the weight's qualified name, with or without its last component. Qualifiers are `layers=`
with inclusive ranges, `cross` and `self`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from graphpeft.methods import Method
from graphpeft.program import Site
from graphpeft.syntax import ALIASES, ROLES, Ranges, expand, path_glob, read

__all__ = ["ALIASES", "ROLES", "Rule", "coerce", "parse", "to_text"]


@dataclass(frozen=True)
class Rule:
    """Which weights get which method. Prints as the text that `parse` reads."""

    target: str
    """As written before the qualifiers: `qv`, `attn+down`, `path(*.in_proj)`."""
    method: Method
    layers: Ranges | None = None
    """Inclusive ranges of layer indices, or `None` for all layers."""
    cross: bool | None = None
    """Only cross-attention, only what is not, or (`None`) both."""
    options: tuple[str, ...] = field(default=(), compare=False)
    """The method's options that the text named, which are printed even where they equal the default."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that the target stands for; none for a `path(...)`."""
        return expand(self.target)

    @property
    def glob(self) -> str | None:
        """The pattern of a `path(...)` target."""
        return path_glob(self.target)

    def selects(self, site: Site) -> str | None:
        """`None` if the rule selects the site, otherwise the reason why it does not."""
        if self.glob is None and site.role not in self.roles:
            return f"role {site.role}"
        if self.glob is not None and not any(
            fnmatchcase(name, self.glob) for name in (site.weight, site.weight.rpartition(".")[0])
        ):
            return f"path not like {self.glob}"
        if self.layers is not None and site.layer is None:
            return "not in a layer"
        if self.layers is not None and not any(site.layer in range(first, last + 1) for first, last in self.layers):
            return f"layer {site.layer} outside {_ranges(self.layers)}"
        if self.cross is not None and site.cross != self.cross:
            return "cross-attention" if site.cross else "not cross-attention"
        return None

    def __str__(self) -> str:
        qualifiers = [f"layers={_ranges(self.layers)}"] if self.layers is not None else []
        if self.cross is not None:
            qualifiers.append("cross" if self.cross else "self")
        where = f"[{', '.join(qualifiers)}]" if qualifiers else ""
        return f"{self.target}{where}:{self.method.text(self.options)}"


def parse(text: str, roles: Iterable[str] = ROLES) -> tuple[Rule, ...]:
    """The rules of a text. `roles` names roles that exist besides the built-in ones.

    Raises `RuleError`, which shows the place with a caret and what would have been accepted there.
    """
    return tuple(Rule(*parts) for parts in read(text, roles))


def coerce(
    rules: str | Rule | Iterable[Rule | str] | Mapping[str, Method | str], roles: Iterable[str] = ROLES
) -> tuple[Rule, ...]:
    """Rules in any of the forms that the public functions accept; a mapping goes from target to method.

    Raises `RuleError` as `parse` does: rules made in Python are checked as if they had been written.
    """
    if isinstance(rules, str):
        return parse(rules, roles)
    if isinstance(rules, Rule):
        return parse(str(rules), roles)
    if isinstance(rules, Mapping):
        rules = [f"{target}:{method}" for target, method in rules.items()]
    return parse("; ".join(str(rule).strip().rstrip(";") for rule in rules), roles)


def to_text(rules: Iterable[Rule]) -> str:
    """One text of all rules; `parse` gives them back."""
    return "; ".join(map(str, rules))


def _ranges(layers: Ranges) -> str:
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in layers)
