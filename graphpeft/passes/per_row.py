"""Per row: several adapters in one batch, each on its own rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graphpeft.capturing.capture import Inputs, example_call, inference_view
from graphpeft.capturing.samples import analysis_config
from graphpeft.compat.pytree import tree_leaves, tree_map
from graphpeft.errors import AdapterError
from graphpeft.rewrite.adapters import home, places
from graphpeft.rewrite.entry import entered
from graphpeft.rewrite.rows import Assignment, Rows
from graphpeft.rewrite.state import chains, example, get_state, names, owners, refuse_merged
from graphpeft.rewrite.sync import opened


@contextmanager
def per_row(
    model: nn.Module, adapters: Sequence[str | None], *, beams: int = 1, inputs: Inputs = None
) -> Iterator[Callable[[Sequence[str | None]], None]]:
    """Within this context each row of a batch runs its own adapter, or the base alone (`None`).

    An adapter computes on its own rows only, so a mixed batch costs little more than a batch with one adapter. Gradients
    flow as usual. The context yields a function that assigns these adapters to the rows of the next batch.

    An experiment finds which axis holds the rows: the model runs on an example call, then on a copy whose last row
    differs. The input of each site must differ in that row and nowhere else.

    Args:
        adapters: a name for each row of the batch.
        beams: the number of beams in beam search, which repeats every row that many times.
        inputs: the example call, with a batch of at least 2; by default the one that `gp.apply` used.

    Raises `AdapterError` for an unknown name, a merged model, or a site whose rows cannot be told apart or that is adapted
    in weight form; and, when the model runs, for a batch of another size.
    """
    model = entered(model, "give rows adapters of their own")
    refuse_merged(model, "give rows adapters of their own")
    get_state(model)
    chosen = names(model, tuple(dict.fromkeys(name for name in adapters if name is not None)))
    assignment = Assignment(beams, rows=dict.fromkeys(chosen, torch.empty(0, dtype=torch.long)))
    assignment.assign(adapters)
    _refuse_weights(model, chosen)
    strengths = {name: get_state(model).active.get(name, 1.0) for name in chosen}
    with opened(model, "gp.per_row", strengths, assignment):
        found = get_state(model).containers
        rows = {path: each for path in owners(model, chosen) if (each := found[path].by_row) is not None}
        _find_rows(model, chosen, rows, example_call(model, example(model, inputs)))
        yield assignment.assign


def _refuse_weights(model: nn.Module, chosen: tuple[str, ...]) -> None:
    for name in chosen:
        for site, chain in chains(model, name).items():
            for place in places(site):
                if place.form == "weight" or chain.before is not None:
                    why = "takes the weight form" if place.form == "weight" else "rounds its input"
                    raise AdapterError(
                        f"Adapter {name!r} {why} at {place.weight} ({place.role}), which applies to the whole batch. Run the "
                        f"rows of each adapter separately, or leave that site out of its rules."
                    )


def _find_rows(model: nn.Module, chosen: tuple[str, ...], rows: dict[str, Rows], call: Any) -> None:
    """Check that each site's input has the batch rows along its first axis, and record the sites that flatten them."""
    batch = next((len(leaf) for leaf in tree_leaves(call) if isinstance(leaf, Tensor) and leaf.dim()), 0)
    if batch < 2:
        raise AdapterError(
            f"The example call has a batch of {batch}, so rows cannot be told apart. Pass inputs= of 2 rows."
        )
    runs = [_seen(model, rows, each) for each in (call, tree_map(lambda leaf: _other_row(leaf, batch), call))]
    for path, owner in owners(model, chosen).items():
        found = home(owner)
        for name in chosen:
            for key, site in found.sites.get(name, {}).items() if found else ():
                one, other = (run.get((path, key)) for run in runs)
                if one is None or other is None or not _apart(one, other, batch):
                    raise AdapterError(
                        f"The input of {site.weight} ({site.role}) has no rows of the batch along its first axis, or the example "
                        f"does not reach it: {None if one is None else tuple(one.shape)} for a batch of {batch}. Pass other "
                        f"`inputs`, or leave that site out of the adapter's rules."
                    )
                rows[path].inner[key] = len(one) > batch


def _apart(one: Tensor, other: Tensor, batch: int) -> bool:
    """Whether two tensors differ only in the last of `batch` equal parts of their first axis."""
    if one.dim() == 0 or one.shape != other.shape or len(one) % batch:
        return False
    kept = len(one) - len(one) // batch
    return torch.equal(one[:kept], other[:kept]) and not torch.equal(one[kept:], other[kept:])


def _seen(model: nn.Module, rows: dict[str, Rows], call: Any) -> dict[tuple[str, str], Tensor]:
    for each in rows.values():
        each.seen = {}
    try:
        with inference_view(model), analysis_config(model):
            model(*call[0], **call[1])
        return {(path, key): x for path, each in rows.items() for key, x in (each.seen or {}).items()}
    finally:
        for each in rows.values():
            each.seen = None


def _other_row(leaf: Any, batch: int) -> Any:
    """The tensor with a changed last row. Masks are kept: changing one could hide the row altogether."""
    if not isinstance(leaf, Tensor) or leaf.dim() == 0 or len(leaf) != batch:
        return leaf
    changed = leaf.clone()
    if leaf.is_floating_point():
        changed[-1] = leaf[-1] * 0.5 + 0.25
        return changed
    values = leaf.unique()
    if leaf.dtype == torch.bool or len(values) < 3:
        return leaf
    changed[-1] = values[(torch.searchsorted(values, leaf[-1].contiguous()) + 1) % len(values)]
    return changed
