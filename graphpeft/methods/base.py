"""A method: a frozen dataclass of options that declares a chain for a site. Rules use its name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from importlib.metadata import entry_points
from math import isfinite
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from graphpeft.chain import Chain
from graphpeft.errors import AdapterError, RuleError
from graphpeft.ir.site import Site


@dataclass(frozen=True)
class Where:
    """A condition on an option's value, for use in `Annotated`, and its description."""

    holds: Callable[[Any], bool]
    text: str


Rank = Annotated[int, Where(lambda r: r >= 1, "int >= 1")]
NotNegative = Annotated[float, Where(lambda x: x >= 0, "float >= 0")]
Positive = Annotated[float, Where(lambda x: x > 0, "float > 0")]
Probability = Annotated[float, Where(lambda p: 0 <= p < 1, "float in [0, 1)")]


@dataclass(frozen=True)
class Summary:
    """A method's row in the tables of README and docs."""

    update: str = ""
    """ΔW in symbols; `*` marks frozen tensors."""
    trained: str = ""
    """The number of trained parameters per site, in terms of its features `in` and `out`."""
    start: str = "0"
    """The update before training."""
    as_lora: str = ""
    """The result of `gp.lower`."""


@dataclass(frozen=True)
class Method:
    """Base of all methods. A subclass is a frozen dataclass with a `name`, a `paper`, options and a `chain`.

    Options are fields annotated with `int`, `float`, `bool`, `str`, `Literal`, `None`, an `Annotated` of these such as
    `Rank`, a `tuple[..., ...]` of one of them, or a union. Their values are checked on construction (`RuleError`).
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[Summary] = Summary()
    examples: ClassVar[Mapping[str, int | None]] = {}
    """Small rules, each with the rank of its trained update (`None`: the base weight decides it). Tests run them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        missing = [name for name in ("name", "paper") if not isinstance(getattr(cls, name, None), str)]
        if missing:
            raise RuleError(f"The method {cls.__qualname__} has no `{missing[0]}`. Add it to the class, as a string.")
        known = _METHODS.get(cls.name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise RuleError(f"There is a method {cls.name!r} already, {known.__qualname__}; choose another name.")
        _METHODS[cls.name] = cls

    def __post_init__(self) -> None:
        for option in options(type(self)):
            option.check(getattr(self, option.name))

    def chain(self, site: Site) -> Chain:
        """The adapter of one site, `site.inputs` to `site.outputs`, with empty tensors."""
        raise NotImplementedError

    def compacted(self, chain: Chain) -> Method | None:
        """This method reduced to what the gates of a trained chain keep; `None` if they keep nothing of the update."""
        return self

    def text(self, given: Iterable[str] = ()) -> str:
        """The text of the method in a rule: `lora(r=4)`, with the `given` options and those that are not the
        default."""
        given = tuple(given)
        changed = (option.name for option in options(type(self)) if getattr(self, option.name) != option.default)
        written = ", ".join(f"{name}={_literal(getattr(self, name))}" for name in dict.fromkeys((*given, *changed)))
        return f"{self.name}({written})" if written else self.name

    def __str__(self) -> str:
        return self.text()


_METHODS: dict[str, type[Method]] = {}


GROUP = "graphpeft.methods"
"""The entry point group by which a package adds methods; each entry names a `Method` or a module of methods."""


@cache
def _installed() -> None:
    """Load the methods of installed packages. A class registers itself when it is created."""
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:
            package = entry.dist.name if entry.dist else "an unknown package"
            raise RuleError(
                f"The method of {package} (entry point {entry.name} = {entry.value}) cannot be loaded: "
                f"{type(error).__name__}: {error}. Usually the package is broken or made for another version. Repair it, or "
                f"uninstall {package}."
            ) from error


def names() -> tuple[str, ...]:
    """The names of all known methods. Raises `RuleError` when a package adds one that cannot be loaded."""
    _installed()
    return tuple(sorted(_METHODS))


def get(name: str) -> type[Method]:
    """The method of that name. Raises `RuleError` for an unknown one."""
    if name not in _METHODS:
        _installed()
    if name not in _METHODS:
        raise RuleError(f"Unknown method {name!r}. Known are: {', '.join(names())}.")
    return _METHODS[name]


@dataclass(frozen=True)
class Option:
    """One option of a method: its name, its type as annotated, its default."""

    method: str
    name: str
    type: Any
    default: Any

    @property
    def accepts(self) -> str:
        """The accepted values in words: `int >= 1`, `float > 0 or none`."""
        return _describe(self.type)

    def check(self, value: object) -> None:
        """Raise `RuleError` unless `value` is accepted."""
        if not _accepts(self.type, value):
            raise RuleError(f"{self.method}: option {self.name} = {_literal(value)} is not {self.accepts}.")


def options(method: type[Method]) -> tuple[Option, ...]:
    """The options that a method accepts, in order."""
    required = [field.name for field in fields(method) if field.default is MISSING]
    if required:
        raise RuleError(f"{method.name}: option {required[0]} needs a default; {method.name!r} alone must be a rule.")
    hints = get_type_hints(method, include_extras=True)
    return tuple(Option(method.name, field.name, hints[field.name], field.default) for field in fields(method))


def check_rank(method: Method, r: int, site: Site) -> None:
    """Raise `AdapterError` if r exceeds the site's smaller width, the number of directions in its decomposition."""
    if r > min(site.shape):
        raise AdapterError(
            f"`{method}` asks for rank {r} of {site.weight} ({site.role}), which is {site.outputs} × {site.inputs} and has no "
            f"more than {min(site.shape)} directions. Choose r <= {min(site.shape)}, or give small sites a rule of their own."
        )


def _accepts(kind: Any, value: object) -> bool:
    origin = get_origin(kind)
    if origin is Annotated:
        base, *conditions = get_args(kind)
        return _accepts(base, value) and all(condition.holds(value) for condition in conditions)
    if origin is tuple:
        return isinstance(value, tuple) and bool(value) and all(_accepts(get_args(kind)[0], each) for each in value)
    if origin in (Union, UnionType):
        return any(_accepts(part, value) for part in get_args(kind))
    if origin is Literal:
        return value in get_args(kind)
    if kind is float:
        return type(value) in (int, float) and isfinite(value)  # type: ignore[arg-type]
    return type(value) is kind


def _describe(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Annotated:
        return " and ".join(condition.text for condition in get_args(kind)[1:])
    if origin is tuple:
        return f"a tuple of {_describe(get_args(kind)[0])}"
    if origin in (Union, UnionType):
        return " or ".join(map(_describe, get_args(kind)))
    if origin is Literal:
        return " or ".join(map(_literal, get_args(kind)))
    return {NoneType: "none", bool: "true or false"}.get(kind, kind.__name__)


def _literal(value: object) -> str:
    """A value as rules write it."""
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_]\w*", value) and value.lower() not in ("true", "false", "none")
        return value if plain else '"' + value.replace("\\", r"\\").replace('"', r"\"") + '"'
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
    return str(value).lower() if value is None or isinstance(value, bool) else repr(value)
