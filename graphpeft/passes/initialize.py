"""Initialize: fill an inserted adapter's tensors. A random tensor depends on (seed, site, place in the chain) alone."""

from __future__ import annotations

from torch import nn

from graphpeft.ir.weights import site_matrix
from graphpeft.rewrite.state import chains, get_state
from graphpeft.tracing import as_pass


@as_pass("initialize", "fill the adapters' tensors")
def initialize(model: nn.Module, name: str) -> None:
    """Give every branch of the adapter its initial values. Tensors on the meta device stay without values."""
    seed = get_state(model).adapters[name].seed
    for site, chain in chains(model, name).items():
        reads = chain.start is not None or chain.needs_base_weight
        chain.reset(seed, site.key, site_matrix(model, site) if reads else None)
