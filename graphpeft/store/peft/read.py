"""Read an adapter that PEFT saved: map its tensors to graphpeft's methods at the sites that dataflow finds.

PEFT adapts a fused projection as a whole, so it becomes one site with the role `other`. A tied weight becomes one site if
the file has the same update at all of its places; otherwise each place that the file names becomes its own site.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphpeft.errors import FileError, RuleError
from graphpeft.files.foreign import shortened
from graphpeft.ir.site import Site
from graphpeft.methods import Method
from graphpeft.methods.dora import DoRA
from graphpeft.methods.lora import LoRA
from graphpeft.methods.vera import VeRA
from graphpeft.planning.plan import Entry
from graphpeft.rewrite.adapters import places
from graphpeft.rewrite.state import find_state, saved
from graphpeft.rules.rule import parse, to_text
from graphpeft.store.native import AdapterFile
from graphpeft.store.peft.config import CONFIG, TENSORS, looked_up, selects_nothing
from graphpeft.store.peft.files import read_both
from graphpeft.store.peft.layout import (
    BANK,
    MAGNITUDE,
    PREFIX,
    NoEquivalent,
    PeftWeight,
    modules,
    shapes,
)
from graphpeft.store.peft.patterns import Patterns
from graphpeft.store.peft.sites import locate

OURS = re.compile(r"^(.+)\.(lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector|vera_lambda_[bd])$")

MOST = 12
"""How many names a message lists."""


@dataclass
class Problems:
    """Mismatches between a file and a model, and dropout that is lost."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    undropped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        found = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.mismatched}
        return "; ".join(f"{what}: {_listed(names)}" for what, names in found.items() if names)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more


Base = Callable[[str], Tensor]
"""A function from a base tensor's name to its values, for a model that has no values itself."""


@dataclass(frozen=True)
class PeftEntry:
    """The file's adapter at one place: the method and its tensors, in the order of the method's factors."""

    site: Site
    method: Method
    values: tuple[Tensor, ...]

    def like(self, other: PeftEntry) -> bool:
        pairs = zip(self.values, other.values, strict=False)
        return self.method == other.method and all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def read_peft(
    model: nn.Module, folder: Path, found: Sequence[Site], *, any_base: bool, strict: bool, base: Base | None = None
) -> AdapterFile:
    """Read the adapter of a folder with `adapter_config.json`; `found` are the sites of the model.

    Raises `FileError` for a config that `parse_config` refuses; for tensors that are missing, unexpected or of another
    shape (without `strict`, warns and reads the complete ones); and for base tensors in the file (`modules_to_save`,
    biases, resized tables) that differ from the model's (with `any_base`, warns). `base` supplies the values of a model
    that has none.
    """
    config, stored = read_both(folder)
    tensors = _without_base(model, config, _named(stored), folder, any_base, base)
    problems, patterns = Problems(), Patterns()
    prefixes = dict.fromkeys(match[1] for key in tensors if (match := OURS.match(key)))
    vera = config["peft_type"] == "VERA"
    try:
        if selects_nothing(config, (name for name, _ in modules(model) if name), patterns):
            raise FileError(
                f"{folder / CONFIG} does not fit {type(model).__name__}: its target_modules, "
                f"{shortened(str(config['target_modules']))}, match none of its modules. Load the base the adapter was made for."
            )
        spots = list(locate(model, config, prefixes, found, patterns))
        read = _vera(config, tensors, spots, problems) if vera else _lora(config, tensors, spots, problems, patterns)
        parts = list(read)
    except NoEquivalent as error:
        raise FileError(f"{folder}: {error}. Use it with PEFT, and merge it there.") from error
    except (RuleError, TypeError, ValueError, re.error, RecursionError, OverflowError) as error:
        raise FileError(
            f"{folder / CONFIG} cannot be understood: {shortened(str(error), 500)} Usually it was edited by hand; save it again "
            f"with PEFT."
        ) from error
    _tell(problems, folder, model, strict)
    if not parts:
        raise FileError(f"{folder} holds nothing that fits {type(model).__name__}. Load the base that it was made for.")
    parts = _tied(model, parts, found)
    return _file(parts, _bank(tensors) if vera else ())


def _named(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, with PEFT's key prefix."""
    named = {key.removesuffix(".weight") if MAGNITUDE in key else key: tensor for key, tensor in found.items()}
    return {key if key.startswith(f"{BANK}.") else PREFIX + key: tensor for key, tensor in named.items()}


def _without_base(
    model: nn.Module,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    folder: Path,
    any_base: bool,
    values: Base | None,
) -> dict[str, Tensor]:
    """The file's tensors without those of the base model, which must equal the model's."""
    state, held = find_state(model), dict(model.named_parameters(remove_duplicate=False))
    own: dict[str, Tensor] = {**held, **dict(model.named_buffers(remove_duplicate=False))}
    own |= state.originals if state else {}
    base = {key: name for key in tensors if (name := _base_name(key)) in own and not OURS.match(key)}
    other = sorted(name for key, name in base.items() if not _same(tensors[key], own[name], values and values(name)))
    if other:
        kept = config.get("modules_to_save")
        found = f"{folder} has base weights that are not the model's: {_listed(other)}" + (
            f" (modules_to_save: {', '.join(kept)})." if kept else "."
        )
        if not any_base:
            raise FileError(
                f"{found} An adapter does not change those. Put them into the model first, as with model.load_state_dict(..., "
                f"strict=False), or pass any_base=True to leave them out."
            )
        warnings.warn(f"{found} They are left out, as any_base=True asks; check the outputs.", stacklevel=6)
    return {key: tensor for key, tensor in tensors.items() if key not in base}


def _base_name(key: str) -> str:
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")


def _same(stored: Tensor, held: Tensor, value: Tensor | None) -> bool:
    if stored.shape != held.shape:
        return False
    known = held if value is None else value
    return known.is_meta or torch.equal(stored.to(known), known)


# -- tensors -------------------------------------------------------------------------------------------------------------


def _lora(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    spots: Sequence[tuple[Site, PeftWeight]],
    problems: Problems,
    patterns: Patterns,
) -> Iterator[PeftEntry]:
    wanted: set[str] = set()
    dora, dropout = bool(config.get("use_dora")), float(config.get("lora_dropout") or 0)
    for site, spot in spots:
        r = looked_up(config.get("rank_pattern"), spot.target, config.get("r", 8), patterns)
        alpha = looked_up(config.get("alpha_pattern"), spot.target, config.get("lora_alpha", 8), patterns)
        a, b = shapes(site, r)
        expected = spot.laid(a, b, torch.empty(b.shape[-2], device="meta") if dora else None)
        wanted |= expected.keys()
        if dora and spot.kind not in ("linear", "conv"):
            raise NoEquivalent(
                f"{spot.target}: for a table, PEFT's DoRA normalizes columns and graphpeft's normalizes rows"
            )
        if not _fit(expected, tensors, problems):
            continue
        rslora = bool(config.get("use_rslora"))
        given = {"r": r, "alpha": None if alpha == r and not rslora else alpha, "rslora": rslora}
        droppable = not dora and site.form == "branch" and spot.kind == "linear"
        if dropout and not droppable and spot.kind != "embedding":
            problems.undropped.append(spot.target)
        method: Method = DoRA(**given) if dora else LoRA(**given, dropout=dropout if droppable else 0.0)
        a, b = spot.read(tensors)
        yield PeftEntry(site, method, (b, a, *([tensors[f"{spot.prefix}.{MAGNITUDE}"].flatten()] if dora else ())))
    problems.unexpected += [key for key in tensors if key not in wanted]


def _vera(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    spots: Sequence[tuple[Site, PeftWeight]],
    problems: Problems,
) -> Iterator[PeftEntry]:
    r, stored = config.get("r", 256), bool(_bank(tensors))
    key, d_initial = config.get("projection_prng_key", 0), config.get("d_initial", 0.1)
    method = VeRA(r, d_initial, key, "projection" if stored else "key")
    sites = [site for site, _ in spots]
    widths = max((s.inputs for s in sites), default=0), max((s.full for s in sites), default=0)
    wanted: dict[str, Tensor] = {}
    if stored or config.get("save_projection", True):
        a, b = torch.empty(r, widths[0], device="meta"), torch.empty(widths[1], r, device="meta")
        wanted |= {f"{BANK}.vera_A": a, f"{BANK}.vera_B": b}
        _fit(wanted, tensors, problems)
    for site, spot in spots:
        names = [f"{spot.prefix}.vera_lambda_{which}" for which in "bd"]
        expected = dict(zip(names, (torch.empty(n, device="meta") for n in (site.full, r)), strict=True))
        wanted |= expected
        if config.get("vera_dropout"):
            problems.undropped.append(spot.target)
        if _fit(expected, tensors, problems):
            yield PeftEntry(site, method, tuple(tensors[name] for name in names))
    problems.unexpected += [key for key in tensors if key not in wanted]


def _bank(tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """VeRA's shared projections B and A, if the file has both."""
    names = [f"{BANK}.vera_{side}" for side in "BA"]
    return tuple(tensors[name] for name in names) if all(name in tensors for name in names) else ()


def _fit(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], problems: Problems) -> bool:
    """Whether the file has these tensors in these shapes."""
    missing = [key for key in expected if key not in tensors]
    wrong = [
        f"{key} {tuple(tensors[key].shape)}, not {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in tensors and tensors[key].shape != tensor.shape
    ]
    problems.missing += missing
    problems.mismatched += wrong
    return not missing and not wrong


def _tell(problems: Problems, folder: Path, model: nn.Module, strict: bool) -> None:
    if problems.undropped:
        warnings.warn(
            f"{folder} was trained with dropout, which graphpeft cannot apply at {_listed(problems.undropped)}; it is dropped.",
            stacklevel=6,
        )
    if not str(problems):
        return
    found = f"{folder / TENSORS} and {CONFIG} do not fit {type(model).__name__}; {problems}."
    if strict:
        raise FileError(
            f"{found} Usually the base is another model, or from another version of transformers. Load the base that the adapter "
            f"was made for; strict=False loads what fits."
        )
    warnings.warn(f"{found} What fits is loaded, as strict=False asks.", stacklevel=6)


# -- conversion to an AdapterFile ----------------------------------------------------------------------------------------


def _tied(model: nn.Module, parts: Sequence[PeftEntry], found: Sequence[Site]) -> list[PeftEntry]:
    """Join the entries of a tied weight into one if the update is the same at all of its places."""
    by_weight, made = {part.site.weight: part for part in parts}, {part.site.weight: part for part in parts}
    for site in found:
        each = [by_weight.get(one.weight) for one in places(site)]
        present = [part for part in each if part is not None]
        if not site.tied or not present:
            continue
        if len(present) == len(each) and all(part.like(present[0]) for part in present):
            for part in present:
                made.pop(part.site.weight, None)
            made[site.weight] = replace(present[0], site=site)
        elif isinstance(model, fx.GraphModule):
            raise FileError(
                f"The file adapts {present[0].site.weight} separately from the weights tied to it, and in a graph of the "
                f"whole model they are one. Load it on the model that was exported."
            )
    return list(made.values())


def _file(parts: Sequence[PeftEntry], bank: tuple[Tensor, ...]) -> AdapterFile:
    globs = _globs(parts)
    entries = [Entry(p.site, p.method, f"path({glob}):{p.method}") for p, glob in zip(parts, globs, strict=True)]
    tensors: dict[str, Tensor] = {}
    for part, entry in zip(parts, entries, strict=True):
        with torch.device("meta"):
            keys = [key for key, _ in saved(entry.site, entry.build())]
        # In the order of the factors: B before A; for VeRA b, B, d, A.
        b, d = part.values[:2]
        values = (b, bank[0], d, bank[1]) if bank else part.values
        tensors |= dict(zip(keys, values, strict=True))
    rules = to_text(parse("; ".join(dict.fromkeys(entry.rule for entry in entries))))
    return AdapterFile("default", rules, 0, tuple(entries), tensors, fingerprint="")


def _globs(parts: Sequence[PeftEntry]) -> list[str]:
    """A glob for each weight: by its last name, if all weights with that name have the same method."""
    names = [part.site.weight.removesuffix(".weight") for part in parts]
    methods: dict[str, set[Method]] = {}
    for part, name in zip(parts, names, strict=True):
        methods.setdefault(name.rpartition(".")[2], set()).add(part.method)
    leaves = [name.rpartition(".")[2] for name in names]
    return [f"*.{leaf}" if "." in n and len(methods[leaf]) == 1 else n for n, leaf in zip(names, leaves, strict=True)]
