from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from graphpeft.chain import Chain, Diag, zeros
from graphpeft.errors import RuleError
from graphpeft.ir.site import Site
from graphpeft.methods import LoRA, Method, Probability, Rank, RLoRA, base, get, names, options


@pytest.fixture
def custom() -> type[Method]:
    """A method as a user declares it, forgotten after the test."""
    before = dict(base._METHODS)

    @dataclass(frozen=True)
    class Custom(Method):
        name: ClassVar[str] = "custom"
        paper: ClassVar[str] = "nowhere"

        r: Rank = 4
        p: Probability = 0.5
        mode: Literal["fast", "slow"] = "fast"
        label: str | None = None

        def chain(self, site: Site) -> Chain:
            return Chain([Diag(site.inputs, zeros())])

    yield Custom
    base._METHODS.clear()
    base._METHODS.update(before)


def test_built_in_methods_are_known_by_name() -> None:
    assert get("lora") is LoRA
    assert get("rlora") is RLoRA
    assert {"lora", "rlora"} <= set(names())
    for name in names():
        assert get(name).paper
        assert get(name).__doc__


def test_a_declared_method_is_known(custom: type[Method]) -> None:
    assert get("custom") is custom
    assert "custom" in names()


def test_unknown_method() -> None:
    with pytest.raises(RuleError, match=r"Unknown method 'lroa'.*lora, melora"):
        get("lroa")


def test_a_name_can_be_taken_once(custom: type[Method]) -> None:
    with pytest.raises(RuleError, match="'custom' already"):

        class Other(Method):
            name: ClassVar[str] = "custom"
            paper: ClassVar[str] = "nowhere"


@pytest.mark.parametrize("missing", ["name", "paper"])
def test_a_method_says_its_name_and_its_paper(missing: str) -> None:
    body = {name: "given" for name in ("name", "paper") if name != missing}
    with pytest.raises(RuleError, match=f"The method Partial has no `{missing}`"):
        type("Partial", (Method,), body)


def test_options_are_listed_in_words(custom: type[Method]) -> None:
    assert [(option.name, option.accepts, option.default) for option in options(custom)] == [
        ("r", "int >= 1", 4),
        ("p", "float in [0, 1)", 0.5),
        ("mode", "fast or slow", "fast"),
        ("label", "str or none", None),
    ]


@pytest.mark.parametrize(
    "given",
    [{"r": 1}, {"p": 0}, {"p": 0.999}, {"mode": "slow"}, {"label": "x"}, {"label": None}],
)
def test_accepted_values(custom: type[Method], given: dict[str, object]) -> None:
    method = custom(**given)
    assert all(getattr(method, name) == value for name, value in given.items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"r": 0}, "r = 0 is not int >= 1"),
        ({"r": 8.0}, "r = 8.0 is not int >= 1"),
        ({"r": True}, "r = true is not int >= 1"),
        ({"r": "8"}, 'r = "8" is not int >= 1'),
        ({"p": 1}, r"p = 1 is not float in \[0, 1\)"),
        ({"p": -0.1}, r"p = -0.1 is not float in \[0, 1\)"),
        ({"p": float("nan")}, r"p = nan is not float in \[0, 1\)"),
        ({"mode": "medium"}, "mode = medium is not fast or slow"),
        ({"label": 3}, "label = 3 is not str or none"),
    ],
)
def test_refused_values(custom: type[Method], given: dict[str, object], message: str) -> None:
    with pytest.raises(RuleError, match=f"custom: option {message}"):
        custom(**given)


def test_lora_refuses_what_would_fail_later() -> None:
    for given in ({"r": -1}, {"alpha": 0}, {"alpha": float("inf")}, {"rslora": 1}, {"dropout": 1.0}):
        with pytest.raises(RuleError, match=f"lora: option {next(iter(given))} = "):
            LoRA(**given)


def test_options_need_defaults(custom: type[Method]) -> None:
    @dataclass(frozen=True)
    class Strict(Method):
        name: ClassVar[str] = "strict"
        paper: ClassVar[str] = "nowhere"
        r: int

    with pytest.raises(RuleError, match="strict: option r needs a default"):
        Strict(3)


def test_text_names_what_differs_and_what_was_given(custom: type[Method]) -> None:
    assert str(LoRA()) == "lora"
    assert str(LoRA(r=4, rslora=True)) == "lora(r=4, rslora=true)"
    assert LoRA(r=4).text(["alpha"]) == "lora(alpha=none, r=4)"
    assert str(custom(label="plain")) == "custom(label=plain)"
    assert str(custom(label='a "b" \\')) == r'custom(label="a \"b\" \\")'
    assert str(custom(label="none")) == 'custom(label="none")'
