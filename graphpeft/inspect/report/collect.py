"""Collect the data of a report as plain values, for the page and for scripts."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from torch import nn

from graphpeft.capturing.capture import Inputs
from graphpeft.chain import Chain
from graphpeft.errors import GraphPeftError
from graphpeft.inspect.adapter_stats import Numbers, numbers
from graphpeft.inspect.network import network
from graphpeft.inspect.report.blocks import Block, blocks
from graphpeft.inspect.rewrite import Rewrite, rewrite
from graphpeft.ir.layers import any_layer, block_of, layer_of
from graphpeft.ir.site import Site
from graphpeft.passes.verify import Level, verify
from graphpeft.planning.outcomes import Tally, tally
from graphpeft.planning.plan import Entry
from graphpeft.rewrite.state import AdapterSet, base_weight, chains, example, find_state
from graphpeft.rules.rule import parse
from graphpeft.show.sites import site_row

Data = dict[str, Any]
PACKAGES = ("graphpeft", "torch", "transformers", "onnxruntime")


def collect(model: nn.Module, inputs: Inputs = None, check: Level = "fast") -> Data:
    """The data of a report on a model, with or without adapters, as JSON-compatible values. Raises `CaptureError`."""
    rewritten = rewrite(model, inputs)
    drawn = blocks(network(rewritten, adapted=False), network(rewritten))
    state = find_state(rewritten.model)
    sites = list(_sites(rewritten, state, drawn)) if state is not None else []
    return {
        "title": rewritten.name,
        "overview": _overview(rewritten, state, inputs, check),
        "sites": [{"id": number, **site} for number, site in enumerate(sites)],
        "skipped": list(_skipped(rewritten, state, drawn)),
        "blocks": [block.as_dict() for block in drawn],
        "heat": _heat(sites),
    }


def _overview(rewritten: Rewrite, state: AdapterSet | None, inputs: Inputs, check: Level) -> Data:
    model, found = rewritten.model, rewritten.found
    sizes = {id(p): (p.numel(), p.requires_grad) for p in model.parameters()}
    facts = [("parameters", f"{sum(n for n, _ in sizes.values()):,}")]
    facts += [("trainable", f"{sum(n for n, required in sizes.values() if required):,}")]
    facts += [("sites found", f"{len(found.sites):,}")]
    facts += [("operators", f"{sum(n.op == 'call_function' for part in rewritten.parts for n in part.before.nodes):,}")]
    adapters: list[Data] = []
    told: dict[str, Tally] = {}
    for name, adapter in state.adapters.items() if state is not None else ():
        status = "merged" if name in state.merged else "active" if name in state.active else "inactive"  # type: ignore
        count = sum(
            p.numel() for p in {id(p): p for c in chains(model, name).values() for p in c.parameters()}.values()
        )
        adapters.append(
            {"name": name, "status": status, "rules": adapter.rules, "sites": len(adapter.entries), "parameters": count}
        )
        told |= {each.rule: each for each in tally(model, found, parse(adapter.rules))}
    rules = [
        dict(zip(("matched", "skipped", "rejected"), each.counts, strict=True)) | {"rule": rule, "notes": each.notes}
        for rule, each in told.items()
    ]
    return {
        "facts": facts,
        "adapters": adapters,
        "rules": rules,
        "verification": _verification(model, state, inputs, check),
        "environment": [("python", platform.python_version()), *((name, version(name)) for name in PACKAGES)],
        "unreached": [
            *({"path": path or "the whole", "reason": why} for path, why in found.unreached.items()),
            *({"path": name, "reason": "adapted, but this call does not use it"} for name in rewritten.absent),
        ],
    }


def _verification(model: nn.Module, state: AdapterSet | None, inputs: Inputs, check: Level) -> list[dict[str, str]]:
    if state is None or state.merged:
        return []
    try:
        checks = verify(model, example(model, inputs), check).checks
    except GraphPeftError as error:  # the report shows the failure
        return [{"check": "verification", "result": "failed", "figure": str(error)}]
    return [{"check": name, "result": "ok" if good else "failed", "figure": text} for name, good, text in checks]


def _sites(rewritten: Rewrite, state: AdapterSet, drawn: list[Block]) -> Iterator[Data]:
    for name, adapter in state.adapters.items():
        found = chains(rewritten.model, name)
        for entry in adapter.entries:
            chain = found[entry.site]
            weight = base_weight(rewritten.model, entry.site.weight)
            yield _site(name, entry, chain, numbers(chain, weight, entry.site), drawn)


def _site(name: str, entry: Entry, chain: Chain, now: Numbers, drawn: list[Block]) -> Data:
    site = entry.site
    return {
        **_row(site, drawn, name),
        "adapter": name,
        "method": str(entry.method),
        "form": site.form if chain.has_side_path else "weight",
        "rank": chain.rank,
        "parameters": sum(p.numel() for p in chain.parameters()),
        "rule": entry.rule,
        "update": now.update,
        "effective_rank": now.effective_rank,
        "kept": now.kept,
        "gates": None if now.kept is None else f"{now.kept} of {chain.rank}",
        "bits": ", ".join(map(str, now.bits)) or None,
        "mean_bits": sum(now.bits) / len(now.bits) if now.bits else None,
    }


def _row(site: Site, drawn: list[Block], adapter: str = "") -> Data:
    """The fields of every site, and the block and node that show it."""
    block, layer = block_of(site.weight), layer_of(site.weight)
    number = next((i for i, one in enumerate(drawn) if one.name == block and layer in one.layers), 0)
    row = site_row(site)
    return {
        **{name: getattr(row, name) for name in ("role", "weight", "rows", "source")},
        "layer": site.layer,
        "shape": row.size,
        "block": number,
        "node": drawn[number].node(any_layer(site.weight), site.role, adapter),
    }


def _skipped(rewritten: Rewrite, state: AdapterSet | None, drawn: list[Block]) -> Iterator[Data]:
    entries = [e for adapter in state.adapters.values() for e in adapter.entries] if state is not None else []
    taken = {entry.site.key for entry in entries}
    rules = [rule for adapter in (state.adapters.values() if state else ()) for rule in parse(adapter.rules)]
    for site in rewritten.found.sites:
        if site.key not in taken:
            reasons = [rule.selects(site) for rule in rules]
            named = [r for r, rule in zip(reasons, rules, strict=True) if any(map(rule.names, (site, *site.tied)))]
            usual = "no rule names this role" if rules else "no adapter is on the model"
            yield {**_row(site, drawn), "reason": next(filter(None, named), usual)}


def _heat(sites: list[Data]) -> list[Data]:
    """A heat map, roles by layers, for each statistic that some site has; the largest of several adapters counts."""
    found = []
    titles = {"update": "‖ΔW‖ / ‖W‖", "effective_rank": "effective rank", "kept": "rank kept", "mean_bits": "mean bits"}
    for key, title in titles.items():
        known: dict[tuple[str, int], float] = {}
        for site in sites:
            if site["layer"] is not None and site[key] is not None:
                place = site["role"], site["layer"]
                known[place] = max(site[key], known.get(place, 0.0))
        if known:
            rows, columns = list(dict.fromkeys(role for role, _ in known)), sorted({layer for _, layer in known})
            values = [[known.get((role, layer)) for layer in columns] for role in rows]
            found.append({"measure": title, "rows": rows, "columns": columns, "values": values})
    return found
