"""Why nothing was found: the texts, the places they name, and that what they tell to try does select sites."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn
from zoo import ZOO

from graphpeft.capturing.samples import analysis_config
from graphpeft.capturing.survey import find_base_sites
from graphpeft.match import Declaration, affine, registry
from graphpeft.match.find import SearchResult
from graphpeft.planning.absence import absences, line_of, nothing
from graphpeft.planning.suggest import roles_present, suggestions
from graphpeft.rules.rule import Rule, parse

MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: ZOO["bert"]("sdpa"),
    "gpt2": lambda: ZOO["gpt2"]("sdpa"),
    "llama": lambda: ZOO["llama"]("sdpa"),
    "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2)),
    "resnet": lambda: tf.ResNetForImageClassification(
        tf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1])
    ),
    "rwkv": lambda: tf.RwkvForCausalLM(tf.RwkvConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2)),
}


@cache
def searched(name: str) -> tuple[nn.Module, SearchResult]:
    with torch.device("meta"):
        model = MODELS[name]().eval()
    with analysis_config(model):
        return model, find_base_sites(model)


def rule(text: str) -> Rule:
    (parsed,) = parse(text)
    return parsed


def told(name: str, text: str) -> str:
    """The message; line numbers and quoted lines of transformers, which change with its version, cut out."""
    message = nothing(*searched(name), rule(text))
    message = re.sub(r"\.py:\d+", ".py:#", message)
    message = re.sub(r"is not _safe_softmax or _softmax or softmax", "is not softmax", message)
    return re.sub(r"^      (\w+ \(.*?\)   )?.*$", r"      \1<code>", message, flags=re.M)


TEXTS = (Path(__file__).parent / "misses.txt").read_text(encoding="utf-8").strip().split("\n\n")
"""The expected messages: `# model`, then the message, whose first word is the rule."""


@pytest.mark.parametrize("expected", TEXTS, ids=lambda text: text.partition("` ")[0].replace("\n", " "))
def test_texts(expected: str) -> None:
    name, _, message = expected.removeprefix("# ").partition("\n")
    assert told(name, message[1:].partition("`")[0]) == message


@pytest.mark.parametrize("name", MODELS)
def test_what_is_told_to_try_selects_sites(name: str) -> None:
    _, found = searched(name)
    for role in {*registry.roles()} - {*roles_present(found)}:
        tried = suggestions(found, rule(f"{role}[layers=0]:rlora(r=3)"))
        assert tried, role
        for text in tried:
            assert text.endswith(":rlora(r=3)")
            assert any(rule(text).selects(site) is None for site in found.sites), text


@pytest.mark.parametrize("name", ["mamba", "resnet", "bert"])
def test_the_line_of_code_is_the_one_at_the_place(name: str) -> None:
    model, found = searched(name)
    shown = [a.near for a in absences(model, found, registry.roles()) if a.near]
    assert shown
    source = inspect.getsource(inspect.getmodule(type(model))).splitlines()  # type: ignore[arg-type]
    file = f"modeling_{name}.py"
    for near in shown:
        place, _, line = near.place.partition(":")
        assert place == file
        assert near.code == source[int(line) - 1].strip() != ""


# Small models of our own, whose lines can be asserted


class Sigmoid(nn.Module):
    """Attention without a softmax; unless `projected`, one whose queries no parameter makes."""

    def __init__(self, projected: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.projected = projected

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.projected:
            return self.d(torch.softmax(x @ self.b(x).mT, -1) @ self.c(x))
        scores = self.a(x) @ self.b(x).mT
        return self.d(torch.sigmoid(scores) @ self.c(x))


def test_the_node_the_line_and_the_code() -> None:
    model = Sigmoid().eval()
    (absence,) = absences(model, find_base_sites(model, (torch.randn(2, 5, 8),)), "qv")
    assert absence.roles == ("q", "v")
    assert absence.outcome == "no match"
    assert absence.near is not None
    lines, start = inspect.getsourcelines(Sigmoid.forward)
    line = int(absence.near.place.removeprefix("test_misses.py:"))
    assert absence.near.code == lines[line - start].strip()
    assert "self" in absence.near.code
    assert re.fullmatch(r"\w+ \(2, 5, (5|8)\)", absence.near.node)
    assert absence.near.reason.endswith("softmax")


def test_a_node_without_a_line_goes_by_its_name() -> None:
    model = Sigmoid(projected=False).eval()
    (absence,) = absences(model, find_base_sites(model, (torch.randn(2, 5, 8),)), "q")
    assert absence.near is not None
    assert (absence.near.place, absence.near.node, absence.near.code) == ("x", "an input (2, 5, 8)", "")


def test_a_role_of_ones_own_tells_its_own_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", [])
    mine = Declaration("my lookup", affine("my.row"), ("my.row",), "nothing is looked up", frozenset({"embedding_bag"}))
    registry.register(mine)
    text = nothing(*searched("bert"), rule("my.row:lora"))
    assert "my.row: no match: nothing is looked up, and nothing in the graph comes near" in text
    assert "Try `attn:lora`" in text
    (absence,) = absences(*searched("bert"), ["unheard"])
    assert (absence.outcome, absence.near) == ("undeclared", None)


def test_parts_that_were_not_captured_are_named() -> None:
    model, _ = searched("bert")
    text = nothing(
        model, SearchResult((), {}, frozenset(), {"vision": "Vision cannot be captured: why\nmore"}), rule("q:lora")
    )
    assert "\n  not seen: vision: Vision cannot be captured: why\n  The graph has no projections at all." in text
    assert "Try" not in text


def test_lines_of_files_that_cannot_be_read() -> None:
    assert line_of("gone.py:3", ["/nowhere/gone.py"]) == ""
    assert line_of("x", []) == ""
