"""PEFT's `adapter_config.json`: checking its fields, and resolving the modules that it targets."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from graphpeft.errors import FileError
from graphpeft.files.foreign import parse_json, shortened
from graphpeft.store.peft.patterns import Patterns

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
T = TypeVar("T")

COMMON = {
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "layers_pattern", "layers_to_transform", "modules_to_save", "peft_type", "peft_version", "r", "revision",
    "target_modules", "task_type",
}  # fmt: skip
STRANGE = {
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "monteclora_config",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
}  # fmt: skip
"""Fields of variants beyond plain LoRA. Files that set one of them are refused."""
KNOWN = {
    "LORA": COMMON | STRANGE | {
        "alpha_pattern", "corda_config", "ensure_weight_tying", "eva_config", "init_lora_weights", "loftq_config",
        "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "qalora_group_size",
        "rank_pattern", "runtime_config", "target_parameters", "use_dora", "use_rslora",
    },
    "VERA": COMMON | {"d_initial", "init_weights", "projection_prng_key", "save_projection", "vera_dropout"},
}  # fmt: skip
"""The fields of PEFT 0.21.2, by `peft_type`."""


LARGEST = 2**31
"""Larger than any real rank or scale, and within torch's and numpy's integer range."""


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < LARGEST


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -LARGEST < value < LARGEST


SHAPES: dict[str, Callable[[Any], bool]] = {
    "r": _is_rank,
    "lora_alpha": _is_number,
    "rank_pattern": lambda ranks: isinstance(ranks, dict) and all(map(_is_rank, ranks.values())),
    "alpha_pattern": lambda alphas: isinstance(alphas, dict) and all(map(_is_number, alphas.values())),
    "lora_dropout": _is_number,
    "vera_dropout": _is_number,
    "d_initial": _is_number,
    "projection_prng_key": lambda key: type(key) is int and 0 <= key < 2**63,
    **{flag: lambda value: isinstance(value, bool) for flag in ("use_dora", "use_rslora", "fan_in_fan_out")},
    "modules_to_save": lambda names: isinstance(names, list) and all(isinstance(name, str) for name in names),
}
"""Checks of the fields that are computed with."""
FREE = {
    "target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern",
    "target_parameters", "base_model_name_or_path",
}  # fmt: skip
"""Fields with patterns or paths, which may contain any characters."""
TEXTS = {
    "init_lora_weights": r"(?i)true|false|gaussian|eva|orthogonal|mica",
    "bias": "none|all|lora_only|vera_only",
    "task_type": r"\w{0,100}",
    "peft_version": r"(\d[\w.+!@-]{0,99})?",
    "revision": r"[\w./+@-]{0,200}",
    "megatron_core": r"[\w.-]{0,100}",
    "base_model_name_or_path": r".{0,4096}",
}
"""Patterns of the other text fields, including fields that nothing uses."""
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Prefixes of `init_lora_weights` values with which PEFT subtracts the initial update from the base weights."""


def _reads(value: Any, shape: str) -> bool:
    return not isinstance(value, str) or re.fullmatch(shape, value) is not None


def parse_config(path: Path, data: bytes) -> dict[str, Any]:
    """Parse and check the config that was read from `path`; unknown fields cause a warning.

    Raises `FileError` for a file that is not PEFT's, a method other than LoRA (with rsLoRA and DoRA) or VeRA, a LoRA
    variant, or an adapter whose update is relative to base weights that PEFT changed.
    """
    config = parse_json(path, data, free=FREE)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in KNOWN:
        raise FileError(
            f"{path}: its peft_type is {kind!r}; only LORA and VERA are supported. Convert it with PEFT (peft.convert_to_lora, "
            f"or merge_and_unload), and load the result."
        )
    strange = sorted(name for name in STRANGE if config.get(name))
    if strange:
        raise FileError(f"{path} sets {', '.join(strange)}, which is more than plain LoRA. Use it with PEFT.")
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(MOVES_BASE):
        raise FileError(
            f"{path} has init_lora_weights={init!r}. With it PEFT changes the base weights, so the file alone does not "
            f"define the update. Convert it with PEFT: model.save_pretrained(folder, "
            f"path_initial_model_for_weight_conversion=<the untrained adapter>)."
        )
    if known := [name for name, shape in TEXTS.items() if not _reads(config.get(name), shape)]:
        raise FileError(
            f"{path}: its {known[0]} is {shortened(str(config[known[0]]))!r}, which PEFT never writes. Usually it was edited by "
            f"hand, or written by a later version of PEFT. Use it with PEFT, and merge it there."
        )
    wrong = [name for name, fits in SHAPES.items() if config.get(name) is not None and not fits(config[name])]
    if wrong:
        raise FileError(
            f"{path}: its {wrong[0]} is {str(config[wrong[0]])[:40]!r}. Usually it was edited by hand; save it again with PEFT."
        )
    unknown = sorted(config.keys() - KNOWN[kind])
    if unknown:
        warnings.warn(f"{path} has fields that this version ignores: {', '.join(unknown)}", stacklevel=7)
    return dict(config)


def selects_nothing(config: Mapping[str, Any], modules: Iterable[str], patterns: Patterns | None = None) -> bool:
    """Whether the config names its target modules, and none of `modules` is among them."""
    targets = config.get("target_modules")
    told = bool(targets) and targets != "all-linear" and not config.get("target_parameters")
    return told and not targeted(config, modules, patterns)


def targeted(config: Mapping[str, Any], modules: Iterable[str], patterns: Patterns | None = None) -> list[str]:
    """The modules that `target_modules` selects; none if it is left to PEFT's defaults or is `all-linear`.

    `patterns` bounds the time of the config's regexes. Raises `ValueError` if they take longer, or cannot be parsed.
    """
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if not targets or targets == "all-linear":
        return []
    chosen = {layers} if isinstance(layers, int) else set(layers or ())
    by = patterns or Patterns()
    excluded, selected = _selector(config.get("exclude_modules"), by), _selector(targets, by)
    named = config.get("layers_pattern") or ()
    layer_patterns = [rf"(?:^|.*?\.){each}" for each in ([named] if isinstance(named, str) else named)]
    layer_patterns = layer_patterns or [r".*?\.[^.]*"]
    full_names = () if isinstance(targets, str) else set(targets)
    found = []
    for name in modules:
        saved = any(by.start(rf"(^|.*\.){each}($|\..*)", name) for each in config.get("modules_to_save") or ())
        if saved or excluded(name) or not selected(name):
            continue
        if chosen and not isinstance(targets, str) and name not in full_names:
            index = next((m for p in layer_patterns if (m := by.first(rf"{p}\.(\d+)\.", name))), None)
            if index is None or index[1] is None or int(index[1]) not in chosen:
                continue
        found.append(name)
    return found


def _selector(targets: str | Sequence[str] | None, by: Patterns) -> Callable[[str], bool]:
    """Whether a module's name matches a regex, or is or ends with one of several names."""
    if isinstance(targets, str):
        regex = targets
        return lambda name: by.whole(regex, name)
    ends = set(targets or ())

    def selects(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[i:]) in ends for i in range(len(parts)))

    return selects


def selection(names: Iterable[str], every: Iterable[str]) -> list[str] | str:
    """The shortest `target_modules` that selects exactly these modules: last names, full names, or a regex."""
    wanted, every = sorted(set(names)), list(every)
    for listed in (sorted({name.rpartition(".")[2] for name in wanted}), wanted):
        if list(filter(_selector(listed, Patterns()), sorted(every))) == wanted:
            return listed
    return "|".join(map(re.escape, wanted))


def pattern(values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    """The most common value, and a `rank_pattern` or `alpha_pattern` for the other targets, by last name if unambiguous."""
    common = Counter(values.values()).most_common(1)[0][0]
    by_leaf: dict[str, set[T]] = {}
    for name, value in values.items():
        by_leaf.setdefault(_leaf(name), set()).add(value)
    key: Callable[[str], str] = lambda name: (  # noqa: E731
        re.escape(_leaf(name)) if len(by_leaf[_leaf(name)]) == 1 else f"^{re.escape(name)}"
    )
    return common, {key(name): value for name, value in values.items() if value != common}


def looked_up(values: Mapping[str, T] | None, target: str, common: T, patterns: Patterns | None = None) -> T:
    """A target's value, matched as PEFT does. Raises `ValueError` as `targeted` does."""
    by = patterns or Patterns()
    return next((value for key, value in (values or {}).items() if by.start(rf"(.*\.)?({key})$", target)), common)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
