"""What the passes share: a captured graph (`Program`) and the places in it that can be adapted (`Site`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx, nn

from graphpeft.errors import AdapterError
from graphpeft.hooked import fetched
from graphpeft.quantized import Kept, dense
from graphpeft.sharded import whole

Rows = tuple[tuple[int, int], ...]
"""Half-open runs of output features, such as `((0, 64), (128, 192))`."""


@dataclass(frozen=True)
class Site:
    """One weight, or some output rows of it, and the role that the graph gives them."""

    role: str
    """One of the declared roles (`q`, `down`, `embed`...), or `other` for a projection without a role."""
    weight: str
    """Qualified name of the parameter, as in `model.state_dict()`."""
    rows: Rows | None
    """Output features that play the role; `None` for all of them."""
    cross: bool
    """Whether queries and keys read different activations (cross-attention)."""
    layer: int | None
    """Index of the repeated block the weight belongs to, or `None`."""
    shape: tuple[int, int]
    """(out, in) features of the adapted rows: of a convolution (out, in / groups · kernel), of an embedding table
    (entries, width), of stacked matrices those of one."""
    form: Literal["branch", "weight"] = "branch"
    """`branch`: a side path is added to the projection's output. `weight`: the weight itself is replaced by weight + delta."""
    owner: str = ""
    """Path of the module whose graph is rewritten; the empty string is the root."""
    full: int = 0
    """Output features of the whole weight (equal to `shape[0]` unless `rows` is given)."""
    transposed: bool = False
    """Whether the weight is stored (in, out), as GPT-2's Conv1D does, instead of (out, in)."""
    stack: int | None = None
    """How many matrices a three-dimensional weight holds, one for each expert; `None` for a weight that is one."""
    tied: tuple[Site, ...] = ()
    """The same weight seen from the other modules that hold and use it (tied embeddings and head): one adapter acts
    in all of them."""
    calls: int = 1
    """How many nodes of the captured graph use the weight."""
    source: str = field(default="", compare=False)
    """File and line of the model's code that makes the projection, as far as the capture knows it."""

    @property
    def outputs(self) -> int:
        return self.shape[0]

    @property
    def inputs(self) -> int:
        return self.shape[1]

    @property
    def key(self) -> str:
        """Unique name of the site in its model; seeds and file keys derive from it, never from an order."""
        return f"{self.weight}:{self.role}"


@dataclass
class Program:
    """A model captured as an FX graph of ATen operators, normalized, with what the matcher needs to know of it."""

    graph: fx.Graph
    model: nn.Module
    """The live model that the weights' names refer to."""
    weights: Mapping[fx.Node, str]
    """Parameter nodes and the qualified names of their parameters."""
    constants: Mapping[fx.Node, torch.Tensor]
    """Nodes of buffers and lifted constants with their real values (on the meta device: without)."""
    whole: bool
    """Whether the graph itself is rewritten (`GraphModule`, `ExportedProgram`) rather than owner modules."""


def stored(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of that qualified name itself, even where a module shows an adapted weight under the name.

    Raises `AdapterError` if there is none, as after pruning.
    """
    path, _, leaf = name.rpartition(".")
    try:
        found = dict(model.get_submodule(path).named_parameters(recurse=False, remove_duplicate=False)).get(leaf)
    except AttributeError:  # no such module
        found = None
    if found is None:
        raise AdapterError(
            f"{name} is no parameter of {type(model).__name__} any more. Usually its module was replaced, or a "
            f"tool has put something else in its place, as pruning does. Take that back first, as by torch.nn.utils.prune.remove."
        )
    return found


def values(model: nn.Module, name: str) -> torch.Tensor:
    """The parameter's numbers in floats, whole and without gradients, wherever they are kept: of a quantized one those that
    it stands for."""
    holder = model.get_submodule(name.rpartition(".")[0])
    with fetched(holder):
        return whole(dense(stored(model, name), holder)).detach()


def matrix(model: nn.Module, site: Site) -> torch.Tensor:
    """The adapted rows of a site's base weight, `(outputs, inputs)`; of stacked matrices `(stack, outputs, inputs)`."""
    return oriented(values(model, site.weight), *layout(site))


Layout = tuple[tuple[int, ...], bool, Rows | None]


def layout(site: Site) -> Layout:
    """How a site's weight is read as a matrix, in values that generated code can hold: see `oriented`."""
    full = site.full or site.outputs
    shape = (site.inputs, full) if site.transposed else (full, site.inputs)
    return ((site.stack, *shape) if site.stack else shape), site.transposed, site.rows


def oriented(weight: torch.Tensor | Kept, shape: tuple[int, ...], transposed: bool, rows: Rows | None) -> torch.Tensor:
    """The adapted rows of a weight, `(outputs, inputs)` or a stack of such."""
    found = dense(weight).reshape(shape)
    found = found.transpose(-1, -2) if transposed else found
    return found if rows is None else torch.cat([found[..., a:b, :] for a, b in rows], -2)
