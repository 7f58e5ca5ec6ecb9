"""Compare two graphs: changed operators, parameters and lines, with equal layers collapsed."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.export import ExportedProgram

from graphpeft.capturing.capture import Inputs
from graphpeft.inspect.graph_alignment import Aligned
from graphpeft.inspect.graph_model import shown
from graphpeft.inspect.network import network
from graphpeft.inspect.rewrite import rewrite
from graphpeft.inspect.to_networkx import to_networkx
from graphpeft.ir.layers import any_layer, any_layer_of_module, layer_of, layer_of_module
from graphpeft.rewrite.state import get_state
from graphpeft.show.folding import collapse_layers, layers_text
from graphpeft.show.view import Grid, View

if TYPE_CHECKING:
    from networkx import MultiDiGraph


@dataclass(frozen=True)
class Parameter:
    """Parameters of equal layers that were added, removed, or changed in values or shape."""

    change: str
    """`added`, `removed` or `changed`."""
    name: str
    """With `*` for the layer's number."""
    shape: str
    layers: tuple[int | None, ...]
    numbers: int
    """Total number of elements in all of them."""


@dataclass(frozen=True)
class Hunk:
    """A run of changed lines, identical in all these layers."""

    path: str
    lines: tuple[str, ...]
    layers: tuple[int | None, ...]


@dataclass(frozen=True)
class Diff(View):
    """The differences of two graphs. Prints itself; false if there are none."""

    names: tuple[str, str]
    operators: Mapping[str, tuple[int, int]]
    """For each operator, how many were added and removed."""
    parameters: tuple[Parameter, ...]
    hunks: tuple[Hunk, ...]
    absent: tuple[str, ...] = ()
    """Adapted weights that the captured graph does not use; another example call (`inputs=`) might use them."""

    def __bool__(self) -> bool:
        return bool(self.operators or self.parameters or self.hunks or self.absent)

    def blocks(self) -> Iterator[Grid | str]:
        if not self:
            return
        yield self._summary()
        yield from (f"not in this graph, whose call does not use it: {name}" for name in self.absent)
        if self.parameters:
            rows = [(p.change, p.name, p.shape, f"{p.numbers:,}", layers_text(p.layers)) for p in self.parameters]
            yield ""
            yield Grid.of(("parameters", "name", "shape", "numbers", ""), rows, right=["numbers"])
        for hunk in self.hunks:
            folds = f"\n  {layers_text(hunk.layers)}" if layers_text(hunk.layers) else ""
            yield "\n" + "\n".join([hunk.path or "(whole graph)", *hunk.lines]) + folds

    def _summary(self) -> str:
        added, removed = (sum(counts) for counts in zip((0, 0), *self.operators.values(), strict=True))
        numbers = Counter[str]()
        for each in self.parameters:
            numbers[each.change] += each.numbers
        told = [f"{change} {count:,} numbers" for change, count in numbers.items()]
        operators = [f"{name} {_signed(*counts)}" for name, counts in self.operators.items()]
        head = f"{self.names[0]} → {self.names[1]}: {_signed(added, removed)} operators"
        return "\n".join([", ".join([head, *told]), *(["  " + ", ".join(operators)] if operators else [])])

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for `json.dumps`."""
        return asdict(self)


def diff(before: Any, after: Any = None, *, inputs: Inputs = None, context: int = 2) -> Diff:
    """Compare two graphs: operators and parameters that were added, removed or changed.

    Args:
        before: anything `to_networkx` accepts: a module, an exported program, an ONNX file or export, a graph. Modules are
            adapted in place, so to see what a pass does, keep `gp.to_networkx(model, values=True)` from before it.
        after: the same; without it, an adapted model is compared with its base.
        inputs: an example call; default: the one given to `apply`, or one made from the model's config.
        context: the number of unchanged lines shown around a change.

    Raises: `AdapterError` for a single model without adapters; `CaptureError`, `FileError`.
    """
    if after is not None:
        one, other = (to_networkx(each, inputs, values=True) for each in (before, after))
        return compare(one, other, context=context)
    if isinstance(before, (nn.Module, ExportedProgram)):
        get_state(before)  # type: ignore[arg-type]
    rewritten = rewrite(before, inputs)
    one, other = (network(rewritten, adapted, values=True) for adapted in (False, True))
    name = one.graph["name"]
    found = compare(one, other, named=True, names=(name, f"{name} with adapters"), context=context)
    return replace(found, absent=rewritten.absent)


def compare(
    before: MultiDiGraph[str],
    after: MultiDiGraph[str],
    *,
    named: bool = False,
    names: tuple[str, str] | None = None,
    context: int = 2,
) -> Diff:
    """Compare graphs from `to_networkx`. With `named`, nodes with equal names are the same node."""
    aligned = Aligned(before, after, named)
    pieces = []
    for path in aligned.paths:
        for hunk in _hunks(*aligned.lines(path), context):
            pieces.append((_general(path, hunk, aligned), layer_of_module(path)))
    hunks = tuple(Hunk(path, text, tuple(layers)) for (path, text), layers in collapse_layers(pieces))
    told = names or (str(before.graph.get("name", "before")), str(after.graph.get("name", "after")))
    return Diff(told, _operators(before, after), tuple(_parameters(before, after)), hunks)


def _operators(before: MultiDiGraph[str], after: MultiDiGraph[str]) -> dict[str, tuple[int, int]]:
    counts = [Counter(a["op"] for _, a in g.nodes(data=True) if a["kind"] == "op") for g in (before, after)]
    change = {name: counts[1][name] - counts[0][name] for name in sorted({*counts[0], *counts[1]})}
    return {name: (max(n, 0), max(-n, 0)) for name, n in change.items() if n}


def _parameters(before: MultiDiGraph[str], after: MultiDiGraph[str]) -> Iterator[Parameter]:
    one, other = _weights(before), _weights(after)
    found: list[tuple[tuple[str, str, str], int | None]] = []
    numbers = Counter[tuple[str, str, str]]()
    for name in dict.fromkeys([*one, *other]):
        change = _change(one.get(name), other.get(name))
        if change:
            about = other.get(name) or one[name]
            key = change, any_layer(name), about.get("shape", "")
            found.append((key, layer_of(name)))
            numbers[key] += about.get("numbers", 0)
    for key, layers in collapse_layers(found):
        yield Parameter(*key, tuple(layers), numbers[key])


def _weights(graph: MultiDiGraph[str]) -> dict[str, Mapping[str, Any]]:
    return {shown(about): about for _, about in graph.nodes(data=True) if about["kind"] == "weight"}


def _change(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> str:
    if one is None or other is None:
        return "added" if one is None else "removed"
    known = [key for key in ("shape", "dtype", "values") if key in one and key in other]
    return "changed" if any(one[key] != other[key] for key in known) else ""


def _signed(added: int, removed: int) -> str:
    return " ".join([*([f"+{added}"] if added or not removed else []), *([f"-{removed}"] if removed else [])])


def _hunks(before: list[str], after: list[str], context: int) -> list[list[str]]:
    """The hunks of a unified diff, without headers."""
    hunks: list[list[str]] = []
    if before == after:
        return hunks
    for line in difflib.unified_diff(before, after, lineterm="", n=context):
        if line.startswith("@@"):
            hunks.append([])
        elif hunks:
            hunks[-1].append(line)
    return hunks


def _general(path: str, hunk: Iterable[str], aligned: Aligned) -> tuple[str, tuple[str, ...]]:
    """A hunk without its layer's number, and with values numbered from 1, so that equal layers give equal hunks."""
    layer, names = layer_of_module(path), dict[str, str]()

    def renamed(found: re.Match[str]) -> str:
        return names.setdefault(found[1], f"%{aligned.stem(found[1], path)}_{len(names) + 1}")

    lines = [re.sub(r"%([\w./ ]+?)(?=[,)\]:]| = |$)", renamed, line) for line in hunk]
    if layer is not None:
        lines = [re.sub(rf"(?<![\w.])((?:[A-Za-z_]\w*\.)+){layer}(?=\.)", r"\1*", line) for line in lines]
    return any_layer_of_module(path), tuple(lines)
