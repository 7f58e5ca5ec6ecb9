"""Weights that several modules hold: what is written into one changes all."""

from __future__ import annotations

from torch import fx, nn

from graphpeft.errors import AdapterError
from graphpeft.ir.site import Site
from graphpeft.ir.weights import get_parameter
from graphpeft.rewrite.adapters import places


def refuse_tied(model: nn.Module, site: Site) -> None:
    """A weight that another module uses too would change there as well, where the adapter never acted.

    A site with tied places lists all that use the weight, so that further modules may hold but do not use it, as T5's
    `shared` does. In a graph of the whole model an adapter acts wherever its weight is used.
    """
    parameter = get_parameter(model, site.weight)
    loose = [place.weight for place in places(site) if get_parameter(model, place.weight) is not parameter]
    if loose:
        raise AdapterError(
            f"{', '.join(loose)} was tied to {site.weight} when adapter and model were joined, and is another tensor now, "
            f"so there is no one weight to fold into. Tie them again, or keep the adapter unmerged."
        )
    holders = {
        id(module): path
        for path, module in model.named_modules()
        for p in module._parameters.values()
        if p is parameter
    }
    if len(holders) > 1 and not site.tied and not isinstance(model.get_submodule(site.owner), fx.GraphModule):
        raise AdapterError(
            f"{site.weight} is tied: {', '.join(holders.values())} hold the same tensor, and merging would change all of "
            f"them, though the adapter acts on one. Untie it first (give one module a clone), or keep the adapter unmerged."
        )
