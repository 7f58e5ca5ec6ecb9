"""The sites in an adapter file, read as untrusted input: every field is validated before anything is built from it."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, fields
from functools import lru_cache
from typing import Any

from graphpeft.errors import RuleError
from graphpeft.files.foreign import LONGEST, shortened
from graphpeft.ir.site import Site
from graphpeft.match.registry import check_name
from graphpeft.methods import options
from graphpeft.planning.plan import Entry
from graphpeft.rules.rule import Rule, parse

LONGEST_ROLE = 100
KINDS: dict[str, tuple[type, ...]] = {
    "role": (str,), "weight": (str,), "cross": (bool,), "layer": (int, type(None)), "form": (str,), "owner": (str,),
    "full": (int,), "transposed": (bool,), "stack": (int, type(None)), "calls": (int,), "source": (str,),
    "rows": (list, type(None)), "shape": (list,), "tied": (list,),
}  # fmt: skip
"""The types of a site's fields after JSON parsing."""


def described(entry: Entry) -> dict[str, Any]:
    """An entry as it is written to a file. Characters of `source` that the reader would refuse are replaced by `_`."""
    about = asdict(entry.site)
    for each in (about, *about["tied"]):
        reader = each.pop("reader")
        each["owner"] = each["owner"] if reader is None else reader  # as a capture finds it
        each["source"] = re.sub(r"[^\w.:<> -]", "_", each["source"])[-LONGEST:]
    method = entry.method.text([option.name for option in options(type(entry.method))])
    scale = {} if entry.scale is None else {"scale": entry.scale}
    return {**about, "method": method, "rule": entry.rule, **scale}


def read_entry(saved: Any) -> Entry:
    """Read an entry from a file. Raises `RuleError`, `ValueError`, `TypeError` or `KeyError` if it is invalid."""
    # The rule grammar parses methods only inside a rule, so wrap the method in one.
    site = _site(saved)
    parsed(saved["rule"])
    (rule,) = parsed(f"linear:{saved['method']}")
    scale = saved.get("scale")
    if scale is not None and (type(scale) not in (int, float) or not math.isfinite(scale)):
        raise ValueError(f"a site has the scale {shortened(str(scale))!r}")
    return Entry(site, rule.method, saved["rule"], None if scale is None else float(scale))


@lru_cache(1000)
def parsed(text: str) -> tuple[Rule, ...]:
    """Parse rules, which may name roles that this process does not know. Raises `RuleError`."""
    roles = {word for word in re.findall(r"[A-Za-z_][\w.]*", text, re.ASCII) if _is_role(word)}
    return parse(text, sorted(roles))


def _is_role(text: str) -> bool:
    """Whether a text is a valid role name, known or not; another package may declare it."""
    try:
        check_name(text)
    except RuleError:
        return False
    return len(text) <= LONGEST_ROLE


def _site(saved: Any) -> Site:
    """Read a site from a file. Raises `ValueError`, `TypeError` or `KeyError` if it is invalid."""
    if not isinstance(saved, dict):
        raise TypeError(f"{str(saved)[:40]!r} is not a site")
    values = {k: v for k, v in saved.items() if k in KINDS and k in {f.name for f in fields(Site)}}
    for name, value in values.items():
        if type(value) not in KINDS[name]:
            raise TypeError(f"a site's {name} is {str(value)[:40]!r}")
    rows, shape = values["rows"], values["shape"]
    values["rows"] = tuple((_size(a, least=0), _size(b)) for a, b in rows) if rows else None
    values["shape"] = tuple(map(_size, shape))
    if not _is_role(values["role"]):
        raise ValueError(f"a site has the role {shortened(values['role'])!r}")
    if values.get("owner") and not values["weight"].startswith(f"{values['owner']}."):
        raise ValueError(f"{shortened(values['weight'])} is not in {shortened(values['owner'])}")
    if len(shape) != 2 or values.get("form", "branch") not in {"branch", "weight"}:
        raise ValueError(f"a site has shape {shape} and form {values.get('form')!r}")
    bounds = [0, *(bound for run in values["rows"] or () for bound in run), values.get("full") or shape[0]]
    if bounds != sorted(bounds):
        raise ValueError(f"a site has rows {rows} of {bounds[-1]}")
    values["tied"] = tuple(map(_site, values.get("tied", ())))
    made = Site(**values)
    if len({(place.owner, place.weight, place.role) for place in (made, *made.tied)}) <= len(made.tied):
        raise ValueError(f"{made.weight} is tied to itself")
    return made


def _size(value: Any, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{str(value)[:40]!r} is not a size")
    return value
