"""Regexes of a PEFT config match as PEFT matches them, and whatever a stranger writes, in bounded time."""

from __future__ import annotations

import contextlib
import json
import random
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checks import build
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

import graphpeft as gp
from graphpeft.errors import FileError
from graphpeft.store.peft import patterns
from graphpeft.store.peft.config import looked_up, selection, targeted
from graphpeft.store.peft.patterns import Patterns

NAMES = [
    *(f"model.layers.{i}.{part}" for i in (0, 1, 11) for part in
      ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.experts.1.up_proj")),
    "model.visual.blocks.0.attn.q_proj", "lm_head", "embed", "h.3.c_attn", "",
]  # fmt: skip
WRITTEN = [
    r".*\.(q|v)_proj", r"model\.layers\.\d+\.self_attn\.(q_proj|v_proj)", r"^(?!.*visual).*q_proj$", r".*proj",
    r"(?i).*Q_PROJ", r"model\.layers\.(0|1[0-5])\..*", r"(?:.*\.)*up_proj", r"lm_head|embed", r"(?<!x)model.*(?<=_proj)",
    r"(?:.*?(?:visual|layers).*?(?:self_attn|attn|mlp).*?(?:q_proj|v_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)"
    r"\.(?:(?:up_proj)))", r"", r"h\.3\.c_attn", r"[^.]+(\.[^.]+){2,3}", r"(\w+)\.layers.*\1?",
]  # fmt: skip
"""Patterns as people write them, with a tool's among them."""
few = pytest.mark.parametrize("few", [None, -1], ids=["", "without re"])


@pytest.fixture
def route(few: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if few is not None:  # no pattern has that few ways
        monkeypatch.setattr(patterns, "FEW", few)


@pytest.mark.parametrize("few", [None, -1], ids=["", "without re"])
@pytest.mark.parametrize("regex", WRITTEN)
def test_targets_are_those_of_peft(regex: str, few: int | None, route: None) -> None:
    if few is not None and r"\1" in regex:
        pytest.skip("only re matches a backreference")
    for fields in ({"target_modules": regex}, {"target_modules": ".*", "exclude_modules": regex}):
        about = SimpleNamespace(
            **{"exclude_modules": None, "modules_to_save": None, "target_parameters": None, **fields}
        )
        want = [name for name in NAMES if check_target_module_exists(about, name) and regex]
        assert targeted(fields, NAMES) == want or not regex


@pytest.mark.parametrize("few", [None, -1], ids=["", "without re"])
@pytest.mark.parametrize("regex", [each for each in WRITTEN if r"\1" not in each and "(?i)" not in each])
def test_values_are_those_of_peft(regex: str, few: int | None, route: None) -> None:
    values = {regex: "one", "up_proj": "two"}
    for name in NAMES:
        assert looked_up(values, name, "none") == values.get(get_pattern_key(list(values), name), "none")


@pytest.mark.parametrize("layers_pattern", [None, "layers", ["h", "layers"], "experts", "layers|h", "[a-z]+"])
def test_layers_are_those_of_peft(layers_pattern: Any) -> None:
    about = {"target_modules": ["up_proj", "c_attn"], "layers_to_transform": [1, 3], "layers_pattern": layers_pattern}
    full = SimpleNamespace(**about, exclude_modules=None, modules_to_save=None, target_parameters=None)
    assert targeted(about, NAMES) == [name for name in NAMES if check_target_module_exists(full, name)]


def made(rng: random.Random, depth: int) -> str:
    """A random pattern."""
    kind = rng.random()
    if depth == 0 or kind < 0.3:
        return rng.choice(
            ["a", "b", ".", r"\.", r"\w", r"\d", "[ab]", "[^a]", "ab", "", "^", "$", r"\b", "(?i:A)", "(?<=a)"]
        )
    inner = made(rng, depth - 1)
    if kind < 0.5:
        return inner + made(rng, depth - 1)
    if kind < 0.65:
        return f"(?:{inner}|{made(rng, depth - 1)})"
    if kind < 0.9:
        return f"({inner}){rng.choice(['*', '+', '?', '*?', '??', '{2}', '{0,3}', '{1,}', '{2,5}?'])}"
    return f"({rng.choice(['?=', '?!'])}{inner})"


@pytest.mark.parametrize("few", [-1])
def test_random_patterns_match_as_re_matches_them(route: None) -> None:
    rng, found = random.Random(0), set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of re, about odd patterns
        for _ in range(2500):
            regex = made(rng, rng.randint(1, 5))
            if len(regex) > 40:  # re itself would take too long
                continue
            name = "".join(rng.choice("aAb.0") for _ in range(rng.randint(0, 6)))
            want = re.fullmatch(regex, name) is not None, re.match(regex, name) is not None
            assert (Patterns().whole(regex, name), Patterns().start(regex, name)) == want, (regex, name)
            found.add(want)
    assert len(found) == 3  # all that there are


EVIL = {
    "nested": "(([a-z_0-9.])+)+!",
    "alternatives": "(?:m|m|[a-z.]|.)*" * 3 + "!",
    "optional": "(?:.?.?)" * 30 + "l" * 60,
    "no repeats": "(?:m|o|[a-z]|.)" * 31 + "!",
    "counted": "((|.){1000}){1000}!",
    "deep": "(" * 60 + ".+" + ")+" * 60 + "!",
    "ahead": "(?=(.*)*!).*",
    "behind": "(.*)*(?<=!)",
    "many repeats": ".*" * 60 + "!",
    "backreference": r"((\w+\.?)+)\1!",
    "same beginnings": "a" * 2_000_000 + "|" + "a" * 2_000_000 + "[b]",
    "wide": "(?i)[" + r"\x00-\uffff" * 800 + "]",
}


@pytest.mark.parametrize("kind", EVIL)
def test_patterns_that_take_for_ever_do_not(kind: str) -> None:
    """Each is matched, or refused by the errors that become a `FileError`; either takes little time."""
    one = EVIL[kind]
    uses: list[Callable[[], object]] = [
        lambda: targeted({"target_modules": one}, NAMES),
        lambda: targeted({"target_modules": ".*", "exclude_modules": one, "modules_to_save": [one]}, NAMES),
        lambda: targeted({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": one}, NAMES),
        lambda: [looked_up({one: 2}, name, 1) for name in NAMES],
    ]
    for use in uses:
        start = time.thread_time()
        with contextlib.suppress(ValueError, re.error, RecursionError):
            use()
        assert time.thread_time() - start < 2


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_what_takes_too_long_is_given_up(field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each place that reads a pattern, with all patterns of the file together."""
    gp.save(gp.apply(build("llama"), "qv:lora(r=2)"), tmp_path, format="peft")
    path = tmp_path / "adapter_config.json"
    regexes = {f"(([a-z.])+)+{i}": 2 for i in range(20_000)}
    path.write_text(
        json.dumps({**json.loads(path.read_text()), field: regexes if "pattern" in field else "(.*)*" * 900})
    )
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    model = build("llama")
    with pytest.raises(
        FileError, match=r"(?s)adapter_config\.json cannot be understood: its patterns.* longer than 0.2 s"
    ):
        gp.load(model, tmp_path)
    assert not hasattr(model, "_graphpeft")


def test_very_many_names_are_looked_up_at_once() -> None:
    """As graphpeft writes the experts of a large model, and as lists of names."""
    every = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(60) for j in range(300)]
    chosen = selection(every[::2], every)
    start = time.thread_time()
    assert targeted({"target_modules": chosen}, every) == every[::2]
    assert targeted({"target_modules": "|".join(map(re.escape, every[::2]))}, every) == every[::2]
    assert time.thread_time() - start < 5
