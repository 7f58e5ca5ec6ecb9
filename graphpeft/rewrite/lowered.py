"""The graph of an owner with its active branches in it."""

from __future__ import annotations

import copy

from torch import fx, nn

from graphpeft.compat.quantized import weight_node
from graphpeft.errors import AdapterError
from graphpeft.ir.site import Site
from graphpeft.match.owners import Uses, trace
from graphpeft.names import unwritable
from graphpeft.rewrite.adapters import Adapters, adapted_parameter
from graphpeft.rewrite.graph import Splice, strip_checks


def lowered(owner: nn.Module, adapters: Adapters) -> fx.Graph:
    """The owner's base graph with every active branch put wherever the owner uses its weight."""
    base = adapters.base_graph if adapters.base_graph is not None else trace(owner)
    graph = fx.Graph() if base is None else strip_checks(copy.deepcopy(base))
    uses = Uses(owner, graph)
    served: set[tuple[nn.Module, nn.Parameter]] = set()  # places of a tied weight may share the owner
    for site, branch, path in adapters.running():
        parameter = adapted_parameter(owner, site)
        if (branch, parameter) in served or (site.form == "weight" and adapters.base_graph is None):
            continue
        served.add((branch, parameter))
        if not adapt(graph, uses, site, branch, path, parameter, rows=adapters.by_row is not None):
            raise AdapterError(no_use(owner, site))
    graph.lint()
    if (target := unwritable(graph)) is not None:
        raise AdapterError(
            f"The graph of a {type(owner).__name__} uses {target[:80]!r}, which no code can name. Usually a module has quotes, a "
            f"backslash or a keyword of Python in its name. Rename it, or choose other sites."
        )
    return graph


def no_use(owner: nn.Module, site: Site) -> str:
    """What to say where an adapter would be ignored."""
    return (
        f"The code of {site.owner or type(owner).__name__} has no use of {site.weight}, so its adapter would be ignored. Usually "
        f"the file was made for another version of the model, or `forward` was replaced on the instance. Apply the rules anew, "
        f"or take the replacement off first."
    )


def adapt(
    graph: fx.Graph,
    uses: Uses,
    site: Site,
    branch: nn.Module,
    path: str,
    parameter: nn.Parameter,
    rows: bool = False,
) -> bool:
    """Put one branch at every use of its weight, with `rows` for those of a batch that are its own; whether there was any."""
    splice = Splice(graph, uses.sums, site, branch, path, rows)
    before = getattr(branch, "before", None)
    if before is not None:
        for affine in uses.of(parameter)[0]:
            splice.before(affine.node, affine.input, before)
        uses.forget(parameter)
    products, picks, reads = uses.of(parameter)
    relative = getattr(branch, "needs_base_weight", False)
    if site.form == "weight" or (relative and (picks or not branch.has_side_path)):
        for node in reads:
            splice.onto(node)
        return bool(reads)
    dtype = parameter.dtype if parameter.is_floating_point() else None
    for affine in products:
        splice.beside(affine.node, affine.input, dtype, weight_node(affine.node, affine.weight))
    for pick in picks:
        splice.lookup(pick)
    return bool(products or picks)
