"""A model's whole graph before and after its adapters are inserted.

The base is captured once. The branches of active adapters are then inserted into a copy of its graph by the same code that
rewrites owners (`owner.adapt`). So common nodes have the same names in both graphs, and every inserted node records its
adapter and site. A second capture could give neither.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import fx, nn
from torch.export import ExportedProgram

from graphpeft.capturing.base_view import base_view
from graphpeft.capturing.capture import Inputs, as_module
from graphpeft.capturing.survey import capture_programs, find_sites
from graphpeft.chain import Chain
from graphpeft.compat.fake_tensors import fill_shapes
from graphpeft.ir.program import Program
from graphpeft.ir.site import Site
from graphpeft.ir.weights import get_parameter
from graphpeft.match.find import SearchResult
from graphpeft.match.owners import Uses
from graphpeft.planning.plan import Entry
from graphpeft.rewrite.adapters import HOME, home, places, slot
from graphpeft.rewrite.graph import with_numbers
from graphpeft.rewrite.lowered import adapt
from graphpeft.rewrite.state import chains, example, find_state
from graphpeft.rewrite.sync import inactive


@dataclass(frozen=True)
class CapturedGraph:
    """One captured graph of a model; most models have only one, for the root."""

    path: str
    model: nn.Module
    before: fx.Graph
    after: fx.Graph
    constants: frozenset[str]
    """Names of the nodes of buffers and lifted constants."""


@dataclass(frozen=True)
class Branch:
    """An adapter's branch at one place of its site."""

    adapter: str
    entry: Entry
    place: Site
    path: str
    """Path from the root."""
    chain: Chain


@dataclass(frozen=True)
class Rewrite:
    """A model's graphs with and without its active adapters, and the result of the site search in the base."""

    model: nn.Module
    found: SearchResult
    parts: tuple[CapturedGraph, ...]
    branches: tuple[Branch, ...]
    absent: tuple[str, ...]
    """Adapted weights that no graph uses; an example call with other inputs might use them."""

    @property
    def name(self) -> str:
        """The name of the model's class, even if the root itself is adapted."""
        kind = type(self.model)
        return str(getattr(kind, "base_class", kind).__name__)


def rewrite(model: nn.Module | ExportedProgram, inputs: Inputs = None) -> Rewrite:
    """Capture a model's base, and insert its active adapters into a copy of the graph. The model does not change.

    For a merged model both graphs are the base's; only the weights differ. Raises `CaptureError`.
    """
    module = as_module(model)
    with base_view(module):
        found = find_sites(capture_programs(_base(module), example(module, inputs)))
    branches = tuple(_branches(module))
    served: set[tuple[nn.Module, nn.Parameter]] = set()
    with inactive(module):  # an active owner may expose the adapted weight under the base weight's name
        parts = tuple(_part(path, program, module, branches, served) for path, program in found.programs.items())
    absent = [b.place.weight for b in branches if (b.chain, get_parameter(module, b.place.weight)) not in served]
    return Rewrite(module, found, parts, branches, tuple(absent))


def _base(module: nn.Module) -> nn.Module:
    """A graph module with its base graph; other modules are captured themselves, with their adapters inactive."""
    adapters = home(module)
    if isinstance(module, fx.GraphModule) and adapters is not None and adapters.base_graph is not None:
        return fx.GraphModule(module, copy.deepcopy(adapters.base_graph))
    return module


def _branches(module: nn.Module) -> Iterator[Branch]:
    state = find_state(module)
    if state is None or state.merged:
        return
    for name in state.active:
        by_site = chains(module, name)
        for entry in state.adapters[name].entries:
            for place in places(entry.site):
                path = ".".join(filter(None, (place.owner, HOME, name, slot(place))))
                yield Branch(name, entry, place, path, by_site[entry.site])


def _part(
    path: str,
    program: Program,
    root: nn.Module,
    branches: tuple[Branch, ...],
    served: set[tuple[nn.Module, nn.Parameter]],
) -> CapturedGraph:
    before = copy.deepcopy(program.graph)
    _read_weights(before, program)
    after = copy.deepcopy(before)
    model = root.get_submodule(path)
    uses, prefix = Uses(model, after), f"{path}." if path else ""
    for branch in branches:
        parameter = get_parameter(root, branch.place.weight)
        if (branch.chain, parameter) in served or not branch.path.startswith(prefix):
            continue
        site = replace(branch.place, owner="")  # here the whole graph acts as the owner
        if adapt(after, uses, site, branch.chain, branch.path.removeprefix(prefix), parameter):
            served.add((branch.chain, parameter))  # places of a tied weight share the parameter
    fill_shapes(with_numbers(after, model), model)
    return CapturedGraph(path, model, before, after, frozenset(node.name for node in program.constants))


def _read_weights(graph: fx.Graph, program: Program) -> None:
    """Replace parameters that the capture lifted to inputs by `get_attr` nodes with their names in the model."""
    names = {node.name: name for node, name in program.weights.items() if node.op == "placeholder"}
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name in names:
            with graph.inserting_before(node):
                read = graph.create_node("get_attr", names[node.name])
            read.meta = dict(node.meta)
            node.replace_all_uses_with(read)
            graph.erase_node(node)
