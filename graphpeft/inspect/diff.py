"""A text diff of the graphs before and after, equal layers folded into one."""

from __future__ import annotations

import copy
import difflib
import re
from dataclasses import dataclass
from typing import Any, cast

from torch import fx, nn

from graphpeft.adapters import HOME, home
from graphpeft.graph import strip_checks
from graphpeft.inspect.table import folded, layers_text
from graphpeft.match.owners import trace
from graphpeft.match.products import op
from graphpeft.owner import relower, restore
from graphpeft.state import get_state, owners


@dataclass(frozen=True)
class Diff:
    """What rewriting changed, one hunk per kind of place; prints itself. Empty if nothing was."""

    text: str
    hunks: int

    def __str__(self) -> str:
        return self.text


def diff(model: nn.Module, context: int = 2) -> Diff:
    """The owners' graphs of an adapted model against their base graphs, as a unified diff.

    Layers with the same change are shown once, with their number. Raises `AdapterError` for a model without adapters.
    """
    state = get_state(model)
    pieces: list[tuple[str, int | None]] = []
    for path, owner in owners(model, tuple(state.adapters)).items():
        before, after = _before_and_after(owner)
        pieces += [_general(path, hunk) for hunk in _hunks(before, after, context)]
    blocks = [f"{text}\n  {layers_text(layers)}" if len(layers) > 1 else text for text, layers in folded(pieces)]
    return Diff("\n\n".join(blocks), len(blocks))


def _before_and_after(owner: nn.Module) -> tuple[list[str], list[str]]:
    """The owner's base and rewritten code as text; for the weight form, what its weights are read as."""
    adapters = home(owner)
    if adapters is None or not adapters.running():
        return [], []
    if adapters.base is not None:
        return lines(strip_checks(copy.deepcopy(adapters.base))), lines(cast(fx.Graph, owner.graph))
    names = {path: s.weight.rpartition(".")[2] for s, _, path in adapters.running() if s.form == "weight"}
    before = sorted(set(names.values()))
    after = [f"{weight} + delta({path.removeprefix(HOME + '.')})" for path, weight in names.items()]
    if owner.graph is None:
        return before, after
    after += lines(cast(fx.Graph, owner.graph))
    restore(owner)
    try:
        base = trace(owner)
    finally:
        relower(owner)
    assert base is not None
    return before + lines(base), after


def lines(graph: fx.Graph) -> list[str]:
    """A graph as text, one operator a line; inputs and parameters appear where they are used."""
    return [_line(n) for n in graph.nodes if n.op not in {"placeholder", "get_attr"}]


def _line(node: fx.Node) -> str:
    def show(value: Any) -> str:
        if isinstance(value, fx.Node):
            return _tensor(str(value.target)) if value.op == "get_attr" else f"%{value.name}"
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(map(show, value)) + "]"
        return str(value)

    arguments = ", ".join([*map(show, node.args), *(f"{k}={show(v)}" for k, v in node.kwargs.items())])
    if node.op == "output":
        return f"return {arguments}"
    return f"%{node.name} = {node.target if node.op == 'call_module' else op(node)}({arguments})"


def _tensor(path: str) -> str:
    """A tensor's path; one of an adapter as `default.q[1].weight`, the tensor of the chain's factor 1."""
    return re.sub(r"^(.+)\.factors\.(\d+)\.", r"\1[\2].", path.removeprefix(f"{HOME}."))


def _hunks(before: list[str], after: list[str], context: int) -> list[list[str]]:
    """The changed stretches of a unified diff, without its headers."""
    hunks: list[list[str]] = []
    for line in difflib.unified_diff(before, after, lineterm="", n=context):
        if line.startswith("@@"):
            hunks.append([])
        elif hunks:
            hunks[-1].append(line)
    return hunks


def _general(path: str, hunk: list[str]) -> tuple[str, int | None]:
    """A hunk with its layer's number taken out and its values numbered from 1, so that equal layers look equal."""
    text = "\n".join([path or "(whole graph)", *hunk])
    numbers = re.findall(r"\.(\d+)\.", path or text)
    layer = int(numbers[0]) if numbers else None
    if layer is not None:
        # The first number of a dotted path; in the name of a whole graph's adapter its dots are underscores.
        text = re.sub(rf"(?<![\w.])((?:[A-Za-z_]\w*\.)+){layer}(?=\.)", r"\1*", text)
        text = re.sub(rf"(?<=\.)([A-Za-z_]+_){layer}(?=_)", r"\1*", text)
    names: dict[str, str] = {}
    text = re.sub(r"%(\w+?)(?:_\d+)?\b", lambda m: names.setdefault(m[0], f"%{m[1]}_{len(names) + 1}"), text)
    return text, layer
