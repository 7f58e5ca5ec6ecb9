"""From a captured graph to its sites: match every declared role, then say which weight, which rows, which owner."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath

import torch
from torch import fx, nn

from graphpeft.match import fused
from graphpeft.match import roles as declared
from graphpeft.match.dataflow import RESHAPES, SAME, Affine, Dataflow, op, partial
from graphpeft.match.owners import locate
from graphpeft.match.pattern import Bound, Match, Miss
from graphpeft.program import Program, Rows, Site, stored


@dataclass(frozen=True)
class Found:
    """Sites in graph order, and per declaration the nearest miss where nothing matched."""

    sites: tuple[Site, ...]
    misses: dict[str, Miss]

    def why_not(self, role: str) -> str:
        """In words, why `role` has no site, as far as the graph tells."""
        for declaration in declared.DECLARED:
            if role in declaration.roles:
                present = dict.fromkeys(s.role for s in self.sites if s.role in declaration.roles)
                if present:
                    return f"its {declaration.name} has {' and '.join(present)} but no {role}"
                miss = self.misses.get(declaration.name)
                near = f"; nearest miss at {where(miss.node)}: {miss.reason}" if miss is not None and miss.depth else ""
                return declaration.absent + near
        return f"no pattern declares the role {role!r}"


def find(program: Program) -> Found:
    """All sites of a program. Seconds grow linearly with the graph."""
    flow = Dataflow(program)
    hits: dict[fx.Node, dict[str, list[Bound]]] = {}
    cross: set[fx.Node] = set()  # cross-attention cores, and the projections around them
    misses: dict[str, Miss] = {}
    for declaration, core, match in _matches(flow, misses):
        for role, bound_here in match.bound.items():
            for bound in bound_here:
                hits.setdefault(bound.node, {}).setdefault(role, []).append(bound)
        if declaration.name == "attention" and _is_cross(flow, match):
            cross |= {core} | {b.node for r in "qkv" for b in match.bound.get(r, ())}
    cross |= {n for n in hits if "o" in hits[n] and any(p[-1] in cross for p in flow.upstream(flow.affines[n].input))}
    sites: dict[tuple[str, str], Site] = {}
    for node, affine in flow.affines.items():
        for role, bounds in hits.get(node, {"other": []}).items():
            site = _site(flow, affine, role, _rows(flow, node, bounds, len(hits.get(node, ()))), node in cross)
            key = (site.weight, role)
            sites[key] = _merge(sites[key], site) if key in sites else site
    return Found(_without_shadows(sites.values()), misses)


def _matches(flow: Dataflow, misses: dict[str, Miss]) -> Iterator[tuple[declared.Declaration, fx.Node, Match]]:
    for declaration in declared.DECLARED:
        for node in filter(flow.barrier, flow.nodes):
            result = declaration.pattern.at(flow, node)
            if isinstance(result, Match):
                yield declaration, node, result
            elif declaration.name not in misses or result.depth > misses[declaration.name].depth:
                misses[declaration.name] = result


def _rows(flow: Dataflow, affine: fx.Node, bounds: Sequence[Bound], roles: int) -> Rows | None:
    """Probe only where some features may be missing: several roles on one projection, or a slice on the way."""
    found: list[Rows | None] = []
    for bound in bounds:
        if bound.seen_from is not affine and (roles > 1 or partial(flow.between(affine, bound.seen_from))):
            found.append(fused.rows(flow, affine, bound.seen_from))
        else:
            found.append(None)
    return _union(found)


def _union(found: Sequence[Rows | None]) -> Rows | None:
    known = [r for r in found if r is not None]
    if not known or len(known) < len(found):
        return None
    mask = torch.zeros(max(b for r in known for _, b in r), dtype=torch.bool)
    for a, b in (run for r in known for run in r):
        mask[a:b] = True
    return fused.runs(mask)


def _is_cross(flow: Dataflow, match: Match) -> bool:
    def source(bound: Bound) -> fx.Node:
        node = flow.affines[bound.node].input
        while op(node) in SAME | RESHAPES and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        return node

    return not {source(b) for b in match.bound["q"]} & {source(b) for b in match.bound["k"]}


def _site(flow: Dataflow, affine: Affine, role: str, rows: Rows | None, cross: bool) -> Site:
    program, name = flow.program, flow.program.weights[affine.weight]
    owner, form = locate(program, affine.node, name)
    # A tied weight has several names: take the one under its owner.
    held = program.model.get_submodule(owner).named_parameters(prefix=owner, remove_duplicate=False)
    parameter = stored(program.model, name)
    local = next(n for n, p in held if p is parameter)
    full, inputs = parameter.shape[::-1] if affine.transposed else parameter.shape
    digits = re.search(r"(?:^|\.)(\d+)\.", name)
    return Site(
        role=role,
        weight=local,
        rows=rows,
        cross=cross,
        layer=int(digits[1]) if digits else None,
        shape=(sum(b - a for a, b in rows) if rows else full, inputs),
        form=form,
        owner=owner,
        full=full,
        transposed=affine.transposed,
        calls=flow.calls[name],
        source=where(affine.node, program.model.get_submodule(owner)),
    )


def _merge(one: Site, other: Site) -> Site:
    return replace(one, rows=_union([one.rows, other.rows]), cross=one.cross or other.cross)


def _without_shadows(sites: Iterable[Site]) -> tuple[Site, ...]:
    """A weight with a role at one call site is not also listed as `other` for the rest."""
    every: list[Site] = list(sites)
    named = {s.weight for s in every if s.role != "other"}
    return tuple(s for s in every if s.role != "other" or s.weight not in named)


def where(node: fx.Node, owner: nn.Module | None = None) -> str:
    """`file.py:line` of the model's code behind a node; else the node's name.

    Frames of torch are skipped, and so is the own code of a leaf such as GPT-2's Conv1D: its caller says more."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [(f, line) for f, line in frames if "torch" not in PurePath(f).parts]
    if owner is not None and not any(owner.children()) and not type(owner).__module__.startswith("torch."):
        own = own[:-1] or own
    return f"{PurePath(own[-1][0]).name}:{own[-1][1]}" if own else node.name
