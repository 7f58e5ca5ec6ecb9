from dataclasses import replace
from itertools import product

import pytest

from graphpeft.errors import RuleError
from graphpeft.ir.site import Site
from graphpeft.match import registry
from graphpeft.match.declaration import Declaration
from graphpeft.match.pattern import affine
from graphpeft.methods import LoRA, RLoRA
from graphpeft.rules.rule import Rule, coerce, parse, to_text

CANONICAL = [
    "qv:rlora",
    "qv:rlora(r=256); mlp:lora(r=8)",
    "qkvo[layers=0-7]:lora(r=8, alpha=16)",
    "q[cross]:lora",
    "q[self]:lora",
    "path(*.in_proj):lora",
    "path(h.[0-3].attn, *.c_attn):lora",
    "qv[layers=0-3,7]:lora",
    "gate+up[layers=5, cross]:lora(rslora=true, alpha=none, dropout=0.05)",
    "qv+mlp:lora(dropout=1e-05)",
    "experts.down:lora; experts.gate+experts.up:lora(r=2)",
    "embed+head+latent[layers=2]:lora",
]


@pytest.mark.parametrize("text", CANONICAL)
def test_canonical_text_prints_back_as_it_was(text: str) -> None:
    assert to_text(parse(text)) == text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("\n qv :\tlora ( r = 8,alpha=+16 ) ;\n mlp : lora ( ) ;", "qv:lora(r=8, alpha=16); mlp:lora"),
        ("q[ cross , layers = 0 - 3 , 7 ]:lora", "q[layers=0-3,7, cross]:lora"),
        ("q[layers=2-2]:lora", "q[layers=2]:lora"),
        ("path ( *.in_proj ):lora", "path(*.in_proj):lora"),
        ("experts.down + router : lora", "experts.down+router:lora"),
        ("q + v:lora(rslora=True, alpha=None)", "q+v:lora(rslora=true, alpha=none)"),
    ],
)
def test_other_text_prints_canonically(text: str, canonical: str) -> None:
    assert to_text(parse(text)) == canonical
    assert parse(text) == parse(canonical)


def test_what_a_text_means() -> None:
    first, second = parse("qkv[layers=0-3,7, self]:lora(r=4, dropout=0.5); path(*.fc1):rlora")
    assert first == Rule("qkv", LoRA(r=4, dropout=0.5), ((0, 3), (7, 7)), False)
    assert first.options == ("r", "dropout")
    assert first.glob is None
    assert second == Rule("path(*.fc1)", RLoRA())
    assert second.glob == "*.fc1"
    assert second.roles == ()


@pytest.mark.parametrize(
    ("target", "roles"),
    [
        ("q", "q"),
        ("oq", "o q"),
        ("qkv", "q k v"),
        ("attn", "q k v o"),
        ("mlp", "gate up down"),
        ("linear", "q k v o gate up down"),
        ("experts", "experts.gate experts.up experts.down"),
        ("experts.down+head", "experts.down head"),
        ("qv+mlp", "q v gate up down"),
        ("up+q", "up q"),
    ],
)
def test_roles_of_a_target(target: str, roles: str) -> None:
    (rule,) = parse(f"{target}:lora")
    assert rule.roles == tuple(roles.split())


def test_every_combination_survives_printing() -> None:
    targets = ["q", "vo", "attn", "mlp", "linear", "qv+down", "path(*.x)"]
    layers = [None, ((0, 0),), ((0, 7),), ((0, 3), (5, 5), (8, 11))]
    methods = [LoRA(), LoRA(r=3), LoRA(alpha=0.1), LoRA(alpha=32, rslora=True, dropout=0.25), RLoRA(), RLoRA(r=1)]
    given = [(), ("r",)]
    for parts in product(targets, methods, layers, [None, True, False], given):
        rule = Rule(*parts)
        (parsed,) = parse(str(rule))
        assert parsed == rule
        assert str(parsed) == str(rule)


# Which sites a rule selects


HEAD = Site("head", "lm_head.weight", None, False, None, (8, 8))
SITE = Site("q", "model.layers.3.attn.q_proj.weight", None, False, 3, (8, 8))


@pytest.mark.parametrize(
    ("text", "change", "reason"),
    [
        ("qv:lora", {}, None),
        ("kv:lora", {}, "role q"),
        ("mlp:lora", {}, "role q"),
        ("mlp:lora", {"role": "gate"}, None),
        ("attn:lora", {"role": "other"}, "role other"),
        ("q[layers=0-2]:lora", {}, "layer 3 outside 0-2"),
        ("q[layers=0-1,4]:lora", {}, "layer 3 outside 0-1,4"),
        ("q[layers=0-1,3]:lora", {}, None),
        ("q[layers=3-9]:lora", {}, None),
        ("q[layers=0-9]:lora", {"layer": None}, "not in a layer"),
        ("q[cross]:lora", {}, "not cross-attention"),
        ("q[cross]:lora", {"cross": True}, None),
        ("q[self]:lora", {}, None),
        ("q[self]:lora", {"cross": True}, "cross-attention"),
        ("path(*.q_proj):lora", {}, None),
        ("path(*.q_proj.weight):lora", {}, None),
        ("path(*.q_proj):lora", {"role": "other"}, None),
        ("path(*.[0-2].*):lora", {}, "path not like *.[0-2].*"),
        ("path(q_proj):lora", {}, "path not like q_proj"),
        ("path(*.q_proj)[layers=4]:lora", {}, "layer 3 outside 4"),
        ("embed:lora", {"role": "embed", "tied": (HEAD,)}, None),
        ("head:lora", {"role": "embed", "tied": (HEAD,)}, None),
        ("path(lm_head):lora", {"role": "embed", "tied": (HEAD,)}, None),
        ("qv:lora", {"role": "embed", "tied": (HEAD,)}, "role embed+head"),
        ("head[layers=3]:lora", {"role": "embed", "tied": (HEAD,)}, "not in a layer"),
        ("embed+head[layers=3]:lora", {"role": "embed", "tied": (HEAD,)}, None),
    ],
)
def test_selection_and_its_reason(text: str, change: dict[str, object], reason: str | None) -> None:
    (rule,) = parse(text)
    assert rule.selects(replace(SITE, **change)) == reason


# The forms rules come in


def test_coerce_accepts_every_form() -> None:
    rules = parse("qv:lora(r=4); mlp:rlora")
    assert coerce("qv:lora(r=4); mlp:rlora") == rules
    assert coerce(rules) == rules
    assert coerce(list(rules)) == rules
    assert coerce(iter(rules)) == rules
    assert coerce(["qv:lora(r=4);", rules[1]]) == rules
    assert coerce(rules[0]) == rules[:1]
    assert coerce({"qv": LoRA(r=4), "mlp": "rlora"}) == rules
    assert coerce({"q[cross]": "lora"}) == parse("q[cross]:lora")


def test_coerce_checks_rules_made_in_python() -> None:
    for rules in (Rule("qz", LoRA()), [Rule("qz", LoRA())], {"qz": LoRA()}):
        with pytest.raises(RuleError, match="Unknown target qz"):
            coerce(rules)
    for rules in ([], {}):
        with pytest.raises(RuleError, match="empty"):
            coerce(rules)


def test_roles_besides_the_declared_ones() -> None:
    (rule,) = parse("hub+q:lora", roles=["hub"])
    assert rule.roles == ("hub", "q")
    assert coerce({"my.hub": LoRA()}, roles=["my.hub"])[0].roles == ("my.hub",)
    with pytest.raises(RuleError, match="Unknown target hub"):
        parse("hub:lora")
    with pytest.raises(RuleError, match=r"Did you mean hubs\?.*, hubs, attn"):
        parse("hub:lora", roles=["hubs"])
    for role, words in {"kv": r"k \+ v", "mlp": r"gate \+ up \+ down"}.items():
        with pytest.raises(RuleError, match=f"cannot be called '{role}': rules read that as {words}"):
            parse("q:lora", roles=[role])


def test_a_registered_role_is_known_to_rules_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", [])
    with pytest.raises(RuleError, match=r"Unknown target bell\.up"):
        parse("bell.up:lora")
    registry.register(Declaration("bell", affine("bell.up"), ("bell.up",), "no bell"))
    assert parse("q+bell.up:lora")[0].roles == ("q", "bell.up")


def test_every_declared_role_is_a_target() -> None:
    for role in registry.roles():
        assert parse(f"{role}:lora")[0].roles == (role,)


# Errors: the text, a caret under the place, and what would be accepted


ERRORS = {
    "qv": ("  ^", "The text ends where I expected ':'"),
    "qv:": ("   ^", "Methods: blora, dora, lora, melora, olora, pissa, rlora, vera."),
    "qv:lora(r=8": ("           ^", "The text ends where I expected ',' or ')'"),
    "qv:lora(8)": ("        ^", "Found 8 where I expected option=value or ')'"),
    "qv$:lora": ("  ^", "Found $ where I expected ':'"),
    "qv:lora(r=)": ("          ^", "Found ) where I expected a number"),
    ":lora": ("^", "Found : where I expected path(glob) or a target"),
    "qv:lora qv:lora": ("        ^", "Found qv where I expected the end"),
    "qv[]:lora": ("   ^", "layers=0-3,7, cross, self"),
    "qv:lora;;q:lora": ("        ^", "Targets: q, k, v, "),
    "qv:7": ("   ^", "Methods: blora, dora, lora, melora, olora, pissa, rlora, vera."),
    "qz:lora": ("^^", "Unknown target qz"),
    "q+gatee:lora": ("  ^^^^^", "Did you mean gate? Targets: q, k, v, "),
    "expertz:lora": ("^^^^^^^", "Did you mean experts?"),
    "experts.dwn:lora": ("^^^^^^^^^^^", "Did you mean experts.down?"),
    "experts.:lora": ("       ^", "Found . where I expected ':'"),
    "experts+experts.up:lora": ("        ^^^^^^^^^^", "The target names the role experts.up twice"),
    "qv:lroa": ("   ^^^^", "Did you mean lora? Methods: blora, dora, lora, melora, olora, pissa, rlora, vera."),
    "qv:lora(rank=8)": ("        ^^^^", "Options: r (int >= 1), alpha (float > 0 or none), rslora (true or false)"),
    "qv:lora(aplha=8)": ("        ^^^^^", "Did you mean alpha?"),
    "qv:lora(r=0)": ("          ^", "lora: option r = 0 is not int >= 1"),
    "qv:lora(r=8.0)": ("          ^^^", "lora: option r = 8.0 is not int >= 1"),
    "qv:lora(r=1, dropout=1.0)": ("                     ^^^", "is not float in [0, 1)"),
    "qv:lora(rslora=1)": ("               ^", "is not true or false"),
    'qv:lora(r="a\\"b")': ("          ^^^^^^", 'option r = "a\\"b" is not int'),
    "qv:lora(r=8,r=8)": ("            ^", "The option r is given twice"),
    "q[layers=7-3]:lora": ("         ^", "The layers 7-3 run backwards"),
    "q[layers=a]:lora": ("         ^", "Found a where I expected a layer"),
    "q[layers=-3]:lora": ("         ^", "where I expected a layer"),
    "q[layers]:lora": ("  ^^^^^^", "This is not how layers is written"),
    "q[cross=3]:lora": ("  ^^^^^", "This is not how cross is written"),
    "q[layer=3]:lora": ("  ^^^^^", "Did you mean layers?"),
    "q[3]:lora": ("  ^", "A layer that no layers= precedes"),
    "q[layers=3,cross,4]:lora": ("                 ^", "A layer that no layers= precedes"),
    "q[cross,self]:lora": ("        ^^^^", "self repeats or contradicts"),
    "q[layers=1,layers=2]:lora": ("           ^^^^^^", "layers repeats or contradicts"),
    "qv+q:lora": ("   ^", "The target names the role q twice"),
    "qq:lora": ("^^", "The target names the role q twice"),
    "qv:lora;vq:lora(r=4)": ("        ^^", "The target vq is given twice"),
    "path( ):lora": ("^^^^^^^", "The path is empty"),
    "path(:lora": ("    ^", "Found ( where I expected ':'"),
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors_point_at_the_place(text: str) -> None:
    caret, words = ERRORS[text]
    with pytest.raises(RuleError) as caught:
        parse(text)
    lines = str(caught.value).splitlines()
    assert lines[1:3] == ["    " + text, "    " + caret]
    assert words in str(caught.value)


def test_errors_in_long_texts_show_the_line() -> None:
    with pytest.raises(RuleError) as caught:
        parse("mlp:lora;\nqv:lora(r=8,\n        alhpa=1)")
    assert str(caught.value).splitlines()[1:3] == ["            alhpa=1)", "            ^^^^^"]


@pytest.mark.parametrize("text", ["", " \n"])
def test_empty_text(text: str) -> None:
    with pytest.raises(RuleError, match="The rules are empty"):
        parse(text)


def test_the_same_target_in_other_layers_is_another_target() -> None:
    assert len(parse("qv[layers=0-3]:lora(r=4); qv[layers=4-7]:lora; qv[layers=4-7, cross]:lora")) == 3
