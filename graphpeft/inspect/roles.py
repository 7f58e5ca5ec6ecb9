"""List the roles that a model has, the roles it lacks and why, and the parts that no example call ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from graphpeft.ir.layers import any_layer, any_layer_of_module, block_of
from graphpeft.ir.site import Rows, Site
from graphpeft.ir.weights import get_parameter
from graphpeft.match.find import SearchResult
from graphpeft.match.registry import roles as declared
from graphpeft.planning.absence import Absence, absences
from graphpeft.show.sites import role_text, rows_text, size_text
from graphpeft.show.table import table


@dataclass(frozen=True)
class Role:
    """All sites of one role and form; `weight`, `rows` and `size` are those of the first."""

    role: str
    sites: int
    layers: int
    """The number of repeated blocks with such a site."""
    weight: str
    rows: Rows | None
    """The first site's rows of a fused weight; `None` if the role has the whole weight."""
    size: str
    form: str
    others: tuple[str, ...]
    """The other weights' names, with `*` for the layer's number."""


@dataclass(frozen=True)
class Unseen:
    """A part of the model that no example call ran."""

    path: str
    weights: int
    """The number of weights in it with two or more axes."""
    reason: str


@dataclass(frozen=True)
class Overview:
    """The roles of a model. Prints as a table and two lists."""

    model: str
    roles: tuple[Role, ...]
    absent: tuple[Absence, ...]
    unseen: tuple[Unseen, ...]

    def __str__(self) -> str:
        rows = [
            (r.role, r.sites, r.layers or "", r.weight + (f"  and {len(r.others)} more" if r.others else ""),
             "" if r.rows is None else rows_text(r.rows), r.size, r.form)
            for r in self.roles
        ]  # fmt: skip
        columns = ("role", "sites", "layers", "weight", "fused rows", "out × in", "form")
        blocks = [table(columns, rows, self.model, right=["sites", "layers"])]
        if self.absent:
            blocks.append("\n".join(["Not found", *(f"  {absence}" for absence in self.absent)]))
        if self.unseen:
            lines = (f"  {u.path or '(all)'}  {u.weights} weights: {u.reason}" for u in self.unseen)
            blocks.append("\n".join(["Not reached", *lines]))
        return "\n\n".join(blocks)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for `json.dumps`."""
        return asdict(self)


def overview(model: nn.Module, found: SearchResult) -> Overview:
    """The roles of a model, from its site search. `other` means projections without a role, and is listed last."""
    grouped: dict[tuple[str, str], list[Site]] = {}
    for site in sorted(found.sites, key=lambda s: s.role == "other"):
        grouped.setdefault((role_text(site), site.form), []).append(site)
    roles = tuple(_role(role, sites) for (role, _), sites in grouped.items())
    return Overview(type(model).__name__, roles, absences(model, found, declared()), tuple(_unseen(model, found)))


def _role(role: str, sites: list[Site]) -> Role:
    first, names = sites[0], dict.fromkeys(any_layer(s.weight) for s in sites)
    blocks = {(block_of(s.weight), s.layer) for s in sites if s.layer is not None}
    return Role(
        role, len(sites), len(blocks), next(iter(names)), first.rows, size_text(first), first.form, tuple(names)[1:]
    )


def _unseen(model: nn.Module, found: SearchResult) -> Iterator[Unseen]:
    """Weights that no example call reached, counted per outermost module without any reached weight."""
    reached = {id(get_parameter(model, name)) for name in found.reached}
    matrices = {name: id(p) in reached for name, p in model.named_parameters() if p.dim() > 1}
    partly = {path for name, seen in matrices.items() if seen for path in _paths(name)}
    counted: Counter[tuple[str, str]] = Counter()
    for name in (name for name, seen in matrices.items() if not seen):
        outermost = next(path for path in _paths(name) if path not in partly)
        counted[any_layer_of_module(outermost), _reason(found, outermost)] += 1
    for (path, reason), weights in counted.items():
        yield Unseen(path, weights, reason)


def _paths(name: str) -> list[str]:
    """The paths of the modules around a parameter, outermost first, and its own path."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) + 1)]


def _reason(found: SearchResult, path: str) -> str:
    for part, why in found.unreached.items():
        if not part or f"{path}.".startswith(f"{part}."):
            return why.strip().splitlines()[0]
    return "no example call runs it"
