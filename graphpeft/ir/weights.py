"""The weight of a site: the parameter itself, its dequantized values, and the matrix to which updates are added."""

from __future__ import annotations

import torch
from torch import nn

from graphpeft.compat.accelerate import materialized
from graphpeft.compat.quantized import Kept, dequantize
from graphpeft.compat.sharded import full_tensor
from graphpeft.errors import AdapterError
from graphpeft.ir.site import Rows, Site


def get_parameter(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of that qualified name itself, even if a module shows an adapted weight under the name.

    Raises `AdapterError` if there is none, for example after pruning.
    """
    path, _, leaf = name.rpartition(".")
    try:
        found = dict(model.get_submodule(path).named_parameters(recurse=False, remove_duplicate=False)).get(leaf)
    except AttributeError:  # no such module
        found = None
    if found is None:
        raise AdapterError(
            f"{name} is no parameter of {type(model).__name__} any more. Usually its module was replaced, or a "
            f"tool replaced the parameter, as pruning does. Undo that first, for example with torch.nn.utils.prune.remove."
        )
    return found


def float_weight(model: nn.Module, name: str) -> torch.Tensor:
    """The parameter's full values in floats, dequantized and without gradients, wherever they are stored."""
    holder = model.get_submodule(name.rpartition(".")[0])
    with materialized(holder):
        return full_tensor(dequantize(get_parameter(model, name), holder)).detach()


def site_matrix(model: nn.Module, site: Site) -> torch.Tensor:
    """The adapted rows of a site's base weight, `(outputs, inputs)`; a stack has `(stack, outputs, inputs)`."""
    return as_out_in(float_weight(model, site.weight), *weight_layout(site))


WeightLayout = tuple[tuple[int, ...], bool, Rows | None]


def weight_layout(site: Site) -> WeightLayout:
    """How to read a site's weight as a matrix, in values that generated code can hold: see `as_out_in`."""
    full = site.full or site.outputs
    shape = (site.inputs, full) if site.transposed else (full, site.inputs)
    return ((site.stack, *shape) if site.stack else shape), site.transposed, site.rows


def as_out_in(weight: torch.Tensor | Kept, shape: tuple[int, ...], transposed: bool, rows: Rows | None) -> torch.Tensor:
    """The adapted rows of a weight, `(outputs, inputs)` or a stack of such matrices."""
    found = dequantize(weight).reshape(shape)
    found = found.transpose(-1, -2) if transposed else found
    return found if rows is None else torch.cat([found[..., a:b, :] for a, b in rows], -2)
