"""The adapter methods as a table: chain, trained parameters, whether they merge and lower to LoRA, and paper."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from graphpeft.chain import Chain
from graphpeft.errors import AdapterError
from graphpeft.ir.site import Site
from graphpeft.match.find import SearchResult
from graphpeft.methods import get, names, options
from graphpeft.planning.plan import make_plan
from graphpeft.rules.rule import coerce
from graphpeft.show.view import Grid, View

SAMPLE = Site("q", "q.weight", None, False, 0, (768, 768))
"""The site for which chains are built and shown."""


def chain_text(chain: Chain) -> str:
    """The factors, with the last one applied first: `Diag · Dense* · Diag · Dense*`, where * means frozen.

    Transforms of a factor's weight are in brackets; a weight rule is written around the whole chain.
    """

    def one(factor: nn.Module) -> str:
        transforms = ", ".join(type(t).__name__ for t in getattr(factor, "transforms", ()))
        frozen = "" if any(True for _ in factor.parameters()) else "*"
        return type(factor).__name__ + frozen + (f"[{transforms}]" if transforms else "")

    text = " · ".join(one(factor) for factor in chain.factors)
    return text if chain.reweight is None else f"{type(chain.reweight).__name__}({text})"


def lowers_text(chain: Chain) -> str:
    """`rank 8`, the rank of the equivalent plain LoRA pair, or `no`."""
    try:
        return f"rank {chain.to_lora()[0].shape[0]}"
    except AdapterError:
        return "no"


@dataclass(frozen=True)
class Described:
    """One method, with its defaults."""

    method: str
    chain: str
    merges: bool
    as_plain_lora: str
    """`rank 8`, the rank of an exactly equivalent pair at 768 × 768, or `no`."""
    paper: str
    options: tuple[dict[str, Any], ...]
    """Name, default, and accepted values of each option."""
    trained: int | None = None
    """Trained parameters on the given model; `None` if the method does not fit it, or without a model."""


@dataclass(frozen=True)
class Methods(View):
    """A table of the methods, and one of their options."""

    described: tuple[Described, ...]
    target: str | None
    """The target whose trained parameters were counted."""

    def blocks(self) -> Iterator[Grid | str]:
        counts = [f"trained at {self.target}"] if self.target else []
        rows = [
            (d.method, d.chain, *(["does not fit" if d.trained is None else f"{d.trained:,}"] if counts else []),
             "yes" if d.merges else "no", d.as_plain_lora, d.paper)
            for d in self.described
        ]  # fmt: skip
        yield Grid.of(("method", "chain (* frozen)", *counts, "merges", "as plain LoRA", "paper"), rows, right=counts)
        yield "\n`as plain LoRA` is the rank of an exactly equal pair at 768 × 768 (see gp.lower), for the default options.\n"
        details = [(d.method, o["name"], o["default"], o["accepts"]) for d in self.described for o in d.options]
        yield Grid.of(("method", "option", "default", "accepts"), details)

    def as_dict(self) -> list[dict[str, Any]]:
        """The same as plain values, for `json.dumps`."""
        return [asdict(each) for each in self.described]


def methods(found: tuple[nn.Module, SearchResult] | None = None, target: str = "qv") -> Methods:
    """All methods; with a model and its sites, also how many parameters each trains at `target` by default.

    Raises `MatchError` if the model has no such sites, `RuleError` if `target` is invalid.
    """
    told = []
    for name in names():
        cls = get(name)
        with torch.device("meta"):
            chain = cls().chain(SAMPLE)
            lowers = lowers_text(chain)
        defaults = {field.name: field.default for field in fields(cls)}
        given = tuple({"name": o.name, "default": defaults[o.name], "accepts": o.accepts} for o in options(cls))
        trained = _trained(found, f"{target}:{name}") if found else None
        told.append(Described(name, chain_text(chain), chain.before is None, lowers, cls.paper, given, trained))
    return Methods(tuple(told), target if found else None)


def _trained(found: tuple[nn.Module, SearchResult], rule: str) -> int | None:
    try:
        return make_plan(*found, coerce(rule)).trainable
    except AdapterError:  # for example, an option that must divide a width of this model
        return None
