"""The trained tensors of an adapter, wherever its chains keep them."""

from __future__ import annotations

from torch import nn

from graphpeft.chain import Chain, Stack, Weighted
from graphpeft.errors import AdapterError
from graphpeft.rewrite.state import chains


def weighted(model: nn.Module, name: str) -> list[Weighted]:
    """Every module of an adapter that holds one tensor, listed once even if sites share it."""
    found = (m for chain in chains(model, name).values() for m in chain.modules())
    return list(dict.fromkeys(m for m in found if isinstance(m, Weighted)))


def trained(model: nn.Module, name: str) -> dict[Weighted, bool]:
    """The modules whose tensor is trained, and whether the tensor is a stack of matrices.

    Raises `AdapterError` if anything else is trained, because noise acts only on a `Weighted`'s tensor.
    """
    found: dict[Weighted, bool] = {}
    for site, chain in chains(model, name).items():
        held = [m for m in chain.modules() if isinstance(m, Weighted)]
        kept = {id(p) for m in held for p in m.parameters()}
        loose = next((path for path, p in chain.named_parameters() if id(p) not in kept), None)
        if loose is not None:
            owner = chain.get_submodule(loose.rpartition(".")[0])
            raise AdapterError(
                f"{type(owner).__name__} of adapter {name!r} at {site.weight} ({site.role}) cannot have noise: it trains "
                f"{loose!r}, which is not the weight of a factor. Leave such sites out of the adapter that PAC is attached to."
            )
        found |= {m: stacked(chain, m) for m in held if isinstance(m.weight, nn.Parameter)}
    return found


def stacked(chain: Chain, module: Weighted) -> bool:
    """Whether the module's tensor is a stack. In a stacked chain a shared factor is common to all matrices."""
    return isinstance(chain, Stack) and not module.shared
