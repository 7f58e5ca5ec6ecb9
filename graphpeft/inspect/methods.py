"""What the methods are, as a table: chain, what is trained, whether an adapter folds and lowers to LoRA, paper."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import nn

from graphpeft.chain import Chain
from graphpeft.errors import AdapterError
from graphpeft.inspect.table import table
from graphpeft.match.find import Found
from graphpeft.methods import get, names, options
from graphpeft.plan import make_plan
from graphpeft.program import Site
from graphpeft.rules import coerce

SAMPLE = Site("q", "q.weight", None, False, 0, (768, 768))
"""The site that a chain is shown for."""


def chain_text(chain: Chain) -> str:
    """The factors as they are written, the last one applied first: `Diag · Dense* · Diag · Dense*`, * for frozen.

    Transforms of a factor's weight stand in brackets, what depends on the base weight around the whole.
    """

    def one(factor: nn.Module) -> str:
        transforms = ", ".join(type(t).__name__ for t in getattr(factor, "transforms", ()))
        frozen = "" if any(True for _ in factor.parameters()) else "*"
        return type(factor).__name__ + frozen + (f"[{transforms}]" if transforms else "")

    text = " · ".join(one(factor) for factor in chain.factors)
    return text if chain.reweight is None else f"{type(chain.reweight).__name__}({text})"


def lowers_text(chain: Chain) -> str:
    """`rank 8`, the rank of the equal plain LoRA pair, or `no`."""
    try:
        return f"rank {chain.to_lora()[0].shape[0]}"
    except AdapterError:
        return "no"


def methods_text(found: tuple[nn.Module, Found] | None = None, target: str = "qv") -> str:
    """The table; with a model and its sites, also what each method with its defaults trains at `target`.

    Raises `MatchError` if the model has no such sites, `RuleError` if `target` is none.
    """
    rows, details = [], []
    for name in names():
        cls = get(name)
        with torch.device("meta"):
            chain = cls().chain(SAMPLE)
            lowers = lowers_text(chain)
        counted = [_trained(found, f"{target}:{name}")] if found else []
        rows.append((name, chain_text(chain), *counted, "yes" if chain.before is None else "no", lowers, cls.paper))
        accepted = {option.name: option.accepts for option in options(cls)}
        details += [(name, field.name, field.default, accepted[field.name]) for field in fields(cls)]
    trained = [f"trained at {target}"] if found else []
    head = table(("method", "chain (* frozen)", *trained, "merges", "as plain LoRA", "paper"), rows, right=trained)
    lines = "`as plain LoRA` is the rank of an exactly equal pair at 768 × 768 (see gp.lower), for the default options."
    return f"{head}\n\n{lines}\n\n{table(('method', 'option', 'default', 'accepts'), details)}"


def _trained(found: tuple[nn.Module, Found], rule: str) -> str:
    try:
        return f"{make_plan(*found, coerce(rule)).trainable:,}"
    except AdapterError:  # such as a divisor that a width of this model does not have
        return "does not fit"
