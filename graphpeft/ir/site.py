"""`Site`: a place in a model that can be adapted. The matcher finds sites; plans and files name them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Rows = tuple[tuple[int, int], ...]
"""Half-open runs of output features, such as `((0, 64), (128, 192))`."""


@dataclass(frozen=True)
class Site:
    """One weight, or some of its output rows, with the role that the graph gives them."""

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
    """(out, in) features of the adapted rows: (out, in / groups · kernel) for a convolution, (entries, width) for an
    embedding table, those of one matrix for stacked matrices."""
    form: Literal["branch", "weight"] = "branch"
    """`branch`: a side path is added to the projection's output. `weight`: the weight itself is replaced by weight + delta."""
    owner: str = ""
    """Path of the module whose graph is rewritten; the empty string is the root."""
    full: int = 0
    """Output features of the whole weight (equal to `shape[0]` unless `rows` is given)."""
    transposed: bool = False
    """Whether the weight is stored (in, out), as GPT-2's Conv1D does, instead of (out, in)."""
    stack: int | None = None
    """The number of matrices in a three-dimensional weight, one for each expert; `None` for a single matrix."""
    tied: tuple[Site, ...] = ()
    """The same weight in other modules that use it (tied embeddings and head): one adapter acts in all of them."""
    calls: int = 1
    """How many nodes of the captured graph use the weight; 0 if no capture has seen it used."""
    reader: str | None = field(default=None, compare=False)
    """Path of the module whose code reads the weight, if that is another than the owner."""
    source: str = field(default="", compare=False)
    """File and line of the model's code that computes the projection, if the capture knows it."""

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
