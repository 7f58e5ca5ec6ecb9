"""From a captured graph to its sites: match every declared role, then determine the weight, its rows and its owner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import fx

from graphpeft.ir.layers import layer_of
from graphpeft.ir.program import Program
from graphpeft.ir.site import Rows, Site
from graphpeft.ir.source import location
from graphpeft.ir.weights import get_parameter
from graphpeft.match import fused
from graphpeft.match.dataflow import Dataflow
from graphpeft.match.declaration import Declaration
from graphpeft.match.operators import partial
from graphpeft.match.owners import locate
from graphpeft.match.pattern import Bound, Match, Miss
from graphpeft.match.products import Affine
from graphpeft.match.registry import declarations
from graphpeft.tracing import as_pass


@dataclass(frozen=True)
class SearchResult:
    """Sites in graph order, and the nearest miss of each declaration that matched nothing."""

    sites: tuple[Site, ...]
    misses: dict[str, Miss]
    reached: frozenset[str] = frozenset()
    """Weights that the captured graph uses."""
    unreached: Mapping[str, str] = field(default_factory=dict)
    """Parts of the model that no example call ran, and why."""
    programs: Mapping[str, Program] = field(default_factory=dict, repr=False, compare=False)
    """The captured programs by module path: the root, and parts that its example call did not run."""


@as_pass("find", "find each weight's role by dataflow")
def find(program: Program) -> SearchResult:
    """All sites of a program, in time linear in the graph."""
    flow = Dataflow(program)
    hits: dict[fx.Node, dict[str, list[Bound]]] = {}
    cross: set[fx.Node] = set()  # cross-attention cores, and the projections around them
    misses: dict[str, Miss] = {}
    for declaration, core, match in _matches(flow, hits, misses):
        for role, bound_here in match.bound.items():
            for bound in bound_here:
                hits.setdefault(bound.node, {}).setdefault(role, []).append(bound)
        if declaration.name == "attention" and _is_cross(flow, match):
            cross |= {core} | {b.node for r in "qkv" for b in match.bound.get(r, ())}
    cross |= {n for n in hits if "o" in hits[n] and any(p[-1] in cross for p in flow.upstream(flow.affines[n].input))}
    sites: dict[tuple[str, str], Site] = {}
    for node in flow.nodes:
        use = flow.affines.get(node) or (Affine(node, node, flow.tables[node]) if node in hits else None)
        if use is None:
            continue
        for role, rows in _roles(flow, use, hits.get(node, {}), misses):
            site = _site(flow, use, role, rows, node in cross)
            key = (flow.program.weights[use.weight], role)
            sites[key] = _merge(sites[key], site) if key in sites else site
    reached = frozenset(name for node, name in program.weights.items() if node in flow.useful)
    return SearchResult(_one_per_weight(sites), misses, reached, programs={"": program})


def _roles(
    flow: Dataflow, use: Affine, hits: Mapping[str, list[Bound]], misses: dict[str, Miss]
) -> list[tuple[str, Rows | None]]:
    """The roles of one use of a weight, each with its rows of the weight."""
    found = []
    for role, bounds in hits.items():
        try:
            rows = _rows(flow, use, bounds, len(hits))
            if rows != ():  # () means that zeros hide its result, or that nothing reads it
                found.append((_named(role, use), _of_weight(use, rows)))
        except fused.UnknownRowsError as error:
            declaration = next(d.name for d in declarations() if role in d.roles)
            misses[declaration] = Miss(use.node, str(error), 99, failed=True)
    if any(role != "latent" and rows is None for role, rows in found):
        found = [f for f in found if f[0] != "latent"]  # it also computes queries, keys or values directly
    return found or [("other", _of_weight(use, None))]


def _named(role: str, use: Affine) -> str:
    """An expert's MLP has roles of its own, so that `mlp:lora` means the dense MLP alone."""
    return f"experts.{role}" if use.kind == "experts" and role in {"gate", "up", "down"} else role


def _matches(
    flow: Dataflow, hits: Mapping[fx.Node, Any], misses: dict[str, Miss]
) -> Iterator[tuple[Declaration, fx.Node, Match]]:
    """Every match of every declaration, in order. The caller updates `hits` before the next declaration."""
    for declaration in declarations():
        found = []
        for node in flow.anchors(declaration.at):
            result = declaration.pattern.at(flow, node)
            if isinstance(result, Match):
                if declaration.rest:
                    result = Match({r: tuple(b for b in bs if b.node not in hits) for r, bs in result.bound.items()})
                found.append((declaration, node, result))
            elif declaration.name not in misses or result.depth > misses[declaration.name].depth:
                misses[declaration.name] = result
        yield from found


def _rows(flow: Dataflow, use: Affine, bounds: Sequence[Bound], roles: int) -> Rows | None:
    """Probe only if some features may be missing: several roles on one projection, or a slice on the path."""
    found: list[Rows | None] = []
    for bound in bounds:
        if bound.seen_from is not use.node and (roles > 1 or partial(flow.between(use.node, bound.seen_from))):
            found.append(fused.rows(flow, use.node, bound.seen_from))
        else:
            found.append(None)
    return _union(found)


def _of_weight(use: Affine, rows: Rows | None) -> Rows | None:
    """Output features as rows of the whole weight, if the projection uses only some of them."""
    if use.first is None:
        return rows
    made = rows or ((0, fused.concrete(use.node.meta["val"].shape)[-1]),)
    return tuple((a + use.first, b + use.first) for a, b in made)


def _union(found: Sequence[Rows | None]) -> Rows | None:
    known = [r for r in found if r is not None]
    if not known or len(known) < len(found):
        return None
    if not any(known):
        return ()
    mask = torch.zeros(max(b for r in known for _, b in r), dtype=torch.bool)
    for a, b in (run for r in known for run in r):
        mask[a:b] = True
    return fused.runs(mask)


def _is_cross(flow: Dataflow, match: Match) -> bool:
    """Whether queries and keys come from different activations, also through a latent bottleneck."""
    latent = {b.node for b in match.bound.get("latent", ())}

    def sources(role: str) -> set[fx.Node]:
        found: set[fx.Node] = set()
        for bound in match.bound.get(role, ()):
            ends = flow.origins(flow.affines[bound.node].input)
            found |= {o for end in ends for o in (flow.origins(flow.affines[end].input) if end in latent else {end})}
        return found

    return not sources("q") & sources("k")


def _site(flow: Dataflow, use: Affine, role: str, rows: Rows | None, cross: bool) -> Site:
    program, name = flow.program, flow.program.weights[use.weight]
    owner, form = locate(program, use.node, name)
    owner = flow.first_paths.get(id(program.model.get_submodule(owner)), owner)  # a module may have several names
    # A tied weight has several names: take the one under its owner.
    held = program.model.get_submodule(owner).named_parameters(prefix=owner, remove_duplicate=False)
    parameter = get_parameter(program.model, name)
    local = next(n for n, p in held if p is parameter)
    stack = parameter.shape[0] if use.kind == "experts" else None
    full, inputs = _matrix(parameter.shape[0 if stack is None else 1 :], use)
    rows = None if rows == ((0, full),) else rows
    return Site(
        role=role,
        weight=local,
        rows=rows,
        cross=cross,
        layer=layer_of(name),
        shape=(sum(b - a for a, b in rows) if rows else full, inputs),
        form=form,
        owner=owner,
        full=full,
        transposed=use.transposed,
        stack=stack,
        calls=flow.calls[name],
        source=location(use.node, program.model.get_submodule(owner)) or use.node.name,
    )


def _matrix(shape: torch.Size, use: Affine) -> tuple[int, int]:
    """(out, in) of a weight as a matrix, with the axes of each side combined."""
    cut = len(shape) - use.outs if use.transposed else use.outs
    first, last = prod(shape[:cut]), prod(shape[cut:])
    return (last, first) if use.transposed else (first, last)


def _merge(one: Site, other: Site) -> Site:
    """Merge two sites of one weight in one role: another call, or another module that holds the weight."""
    tied = one.tied
    if other.weight not in {one.weight, *(t.weight for t in tied)}:
        tied += (other,)
    return replace(one, rows=_union([one.rows, other.rows]), cross=one.cross or other.cross, tied=tied)


def _one_per_weight(sites: Mapping[tuple[str, str], Site]) -> tuple[Site, ...]:
    """Make one site of a table that is also the head, and drop `other` for a weight that has a role elsewhere."""
    merged = dict(sites)
    named = {weight for weight, role in sites if role != "other"}
    for (weight, role), site in sites.items():
        table = merged.get((weight, "embed"))
        if role == "other" and weight in named and (table is None or site.weight == table.weight):
            del merged[weight, role]
        elif table is not None and role != "embed":
            merged[weight, "embed"] = replace(table, tied=(*table.tied, merged.pop((weight, role))))
    return tuple(merged.values())
