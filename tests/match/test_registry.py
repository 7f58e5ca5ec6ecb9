"""Roles from outside the package: registered in the process, or found through entry points of installed packages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphpeft as gp
from graphpeft.errors import RuleError
from graphpeft.match import (
    Declaration,
    affine,
    each,
    elementwise,
    flow,
    join,
    mul,
    register,
    registry,
    softmax,
    unbound,
)
from graphpeft.match.registry import bound, declarations, roles

X = torch.randn(2, 5, 8)
BELL = Declaration("bell", softmax(flow(affine("bell"))), ("bell",), "no bell rings")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing registered or installed stays for the next test."""
    monkeypatch.setattr(registry, "_REGISTERED", [])
    registry._installed.cache_clear()
    yield
    registry._installed.cache_clear()


class Bells(nn.Module):
    """Gates over features, a softmax of one projection: no built-in role fits."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.a(x), -1) * F.relu(self.b(x))


def found() -> dict[str, str]:
    return {s.weight: s.role for s in gp.sites(Bells().eval(), (X,))}


def test_a_registered_role_is_found_and_adapted() -> None:
    before = found()
    assert before["a.weight"] == "other"
    register(BELL)
    assert found() == {"a.weight": "bell", "b.weight": before["b.weight"]}
    model = gp.apply(Bells().eval(), "bell:lora(r=2)", inputs=(X,), expect=1)
    assert gp.trainable(model)[0] == 2 * 8 * 2


def test_registering_again_changes_nothing() -> None:
    known = declarations()
    register(BELL)
    register(BELL)
    register(Declaration("bell", softmax(flow(affine("bell"))), ("bell",), "no bell rings"))  # a cell that ran twice
    assert declarations() == (*known[: len(known) - rest()], BELL, *known[len(known) - rest() :])
    assert roles().count("bell") == 1


def rest() -> int:
    """How many built-in declarations take what is left; those from outside are tried before them."""
    return sum(d.rest for d in registry.DECLARED)


CLASHES: dict[str, tuple[Callable[[], Declaration], str]] = {
    "role of ours": (
        lambda: Declaration("mine", affine("q"), ("q",), ""),
        r"'mine' from register\(\) binds the role 'q', which 'attention' from graphpeft declares.*'my\.q'",
    ),
    "name of ours": (lambda: Declaration("mlp", affine("x"), ("x",), ""), r"the name of another, from graphpeft"),
    "role of another": (
        lambda: Declaration("mine", affine("bell"), ("bell",), ""),
        r"binds the role 'bell', which 'bell' from register",
    ),
    "name of another": (lambda: Declaration("bell", affine("x"), ("x",), ""), r"the name of another, from register"),
    "a run of letters": (lambda: Declaration("mine", affine("qo"), ("qo",), ""), r"rules read that as q \+ o"),
    "an alias": (lambda: Declaration("mine", affine("attn"), ("attn",), ""), r"rules read that as q \+ k \+ v \+ o"),
    "no word": (lambda: Declaration("mine", affine("a-b"), ("a-b",), ""), r"cannot be called 'a-b'.*words joined by"),
    "given out": (lambda: Declaration("mine", affine("other"), ("other",), ""), r"'other', which graphpeft itself"),
    "not listed": (
        lambda: Declaration("mine", join(flow(affine("my.out")), "my.in"), ("my.in",), ""),
        r"lists the roles my\.in, but its pattern binds my\.out too",
    ),
    "no declaration": (lambda: "bell", r"gives a str, which declares no role"),  # type: ignore[dict-item, return-value]
}


@pytest.mark.parametrize("case", CLASHES)
def test_what_cannot_be_registered(case: str) -> None:
    register(BELL)
    before = declarations()
    make, message = CLASHES[case]
    with pytest.raises(RuleError, match=message):
        register(make())
    assert declarations() == before


def test_the_built_in_patterns_bind_what_their_declarations_list() -> None:
    for declaration in registry.DECLARED:
        assert set(bound(declaration.pattern)) == set(declaration.roles), declaration.name
    nested = each(
        softmax(flow(affine("a", elementwise(mul(affine("b"), affine("c"))) | affine("d", unbound(affine("e"))))))
    )
    assert set(bound(nested)) == set("abcd")


# Entry points


def install(folder: Path, name: str, code: str, entries: str) -> None:
    """A distribution as pip leaves it: a module, and the metadata beside it."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{entries}\n")


HOME = """
from graphpeft.match import Declaration, affine, flow, softmax
BELL = Declaration("bell", softmax(flow(affine("bell"))), ("bell",), "no bell rings")
GONG = [Declaration("gong", affine("gong"), ("gong",), "no gong", frozenset({"mv"}))]
LOADED = open(__file__ + ".log", "a").write("loaded ")
"""


@pytest.fixture
def site_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("home_roles", "more_roles"):
        sys.modules.pop(name, None)


def test_roles_of_installed_packages_are_loaded_once(site_packages: Path) -> None:
    install(site_packages, "home_roles", HOME, "bell = home_roles:BELL\ngong = home_roles:GONG")
    assert not (site_packages / "home_roles.py.log").exists()  # only when roles are asked for
    assert {"bell", "gong"} <= set(roles())
    assert found()["a.weight"] == "bell"
    sys.modules.pop("home_roles")  # were it loaded again, it would say so again
    assert "gong" in roles()
    assert (site_packages / "home_roles.py.log").read_text() == "loaded "


BROKEN = {
    "no such module": (
        "",
        "bell = nowhere:BELL",
        r"home-roles \(entry point bell = nowhere:BELL\).*ModuleNotFoundError",
    ),
    "no such name": (HOME, "bell = home_roles:BEL", r"AttributeError.*uninstall home-roles"),
    "it raises": ("1 / 0", "bell = home_roles:BELL", r"ZeroDivisionError: division by zero"),
    "not a declaration": ("BELL = 7", "bell = home_roles:BELL", r"home-roles \(entry point.*gives a int"),
    "role of ours": (
        HOME.replace('"bell"', '"head"'),
        "bell = home_roles:BELL",
        r"'head' from home-roles \(entry point bell = home_roles:BELL\) has the name of another, from graphpeft",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_packages_are_named(site_packages: Path, case: str) -> None:
    code, entries, message = BROKEN[case]
    install(site_packages, "home_roles", code, entries)
    for _ in range(2):  # not only the first time
        with pytest.raises(RuleError, match=message):
            gp.plan(Bells(), "q:lora", inputs=(X,))


def test_two_packages_that_declare_one_role_are_both_named(site_packages: Path) -> None:
    install(site_packages, "home_roles", HOME, "bell = home_roles:BELL")
    install(site_packages, "more_roles", HOME.replace('n("bell"', 'n("chime"'), "chime = more_roles:BELL")
    with pytest.raises(RuleError, match=r"(home|more)-roles.*binds the role 'bell', which .*(home|more)-roles"):
        roles()


def test_what_is_installed_may_be_registered_too(site_packages: Path) -> None:
    install(site_packages, "home_roles", HOME, "bell = home_roles:BELL")
    register(BELL)
    assert [d.name for d in declarations()].count("bell") == 1
