"""The graph passes of an export, in order, on onnx_ir's pass infrastructure. The census is each pass's postcondition.

A pass is a function of a graph and its slots that changes the graph in place and returns the new slots, or `None` if they
are unchanged. To add one, write the function in its own file and list it in `pipeline`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes import FunctionalPass, InPlacePass, PassBase, PassResult, Sequential

from graphpeft.exporting.onnx.census import attach_defaults, census
from graphpeft.exporting.onnx.gemm import fuse_sums
from graphpeft.exporting.onnx.quantize import Bits, quantize
from graphpeft.exporting.onnx.rows import gate_rows
from graphpeft.exporting.onnx.share import share
from graphpeft.exporting.onnx.tags import tag
from graphpeft.runtime.layout import AdapterInput

WRAPPERS = (ir.passes.PassError, ir.passes.InvariantError)
Rewrite = Callable[[ir.Model, Sequence[AdapterInput]], "tuple[AdapterInput, ...] | None"]


class Slots:
    """The current slots of the graph; a pass that merges or changes slots updates them here."""

    def __init__(self, slots: Sequence[AdapterInput]) -> None:
        self.now = tuple(slots)


class SlotPass(InPlacePass):
    """A function over a graph with slots, as an onnx_ir pass. Its postcondition is that every slot is alive."""

    def __init__(self, name: str, rewrite: Rewrite, slots: Slots) -> None:
        self.name, self.rewrite, self.slots = name, rewrite, slots

    def call(self, model: ir.Model) -> PassResult:
        found = self.rewrite(model, self.slots.now)
        self.slots.now = self.slots.now if found is None else found
        return PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        census(model, self.slots.now)

    def __str__(self) -> str:
        return self.name


class Quantize(FunctionalPass):
    """`quantize` as an onnx_ir pass that returns a new graph, with every slot alive."""

    def __init__(self, slots: Slots, bits: Bits, accuracy_level: int) -> None:
        self.slots, self.bits, self.accuracy_level = slots, bits, accuracy_level

    def call(self, model: ir.Model) -> PassResult:
        return PassResult(quantize(model, self.slots.now, self.bits, self.accuracy_level), modified=True)

    def ensures(self, model: ir.Model) -> None:
        census(model, self.slots.now)

    def __str__(self) -> str:
        return "quantize"


def pipeline(slots: Slots, *, swappable: bool, shared: bool = False, per_row: bool = False) -> Sequential:
    """The passes over a translated graph before it is saved; `swappable` means that the graph has slots."""
    passes: Mapping[str, tuple[Rewrite, bool]] = {
        "share": (share, shared),
        "rows": (gate_rows, per_row),
        "gemm": (fuse_sums, swappable),
        "tags": (tag, True),
        "defaults": (attach_defaults, True),
    }
    return Sequential(*(SlotPass(name, rewrite, slots) for name, (rewrite, wanted) in passes.items() if wanted))


def quantizing(slots: Slots, bits: Bits, accuracy_level: int) -> Sequential:
    """The passes that quantize a saved graph."""
    return Sequential(Quantize(slots, bits, accuracy_level), SlotPass("tags", tag, slots))


def listed(passes: PassBase) -> tuple[str, ...]:
    """The names of the passes in a sequence."""
    return tuple(map(str, passes.passes)) if isinstance(passes, Sequential) else (str(passes),)


def run(passes: PassBase, model: ir.Model) -> ir.Model:
    """Run passes over a graph. onnx_ir wraps the error of a pass in errors of its own; here the pass's error itself is raised."""
    try:
        return passes(model).model
    except WRAPPERS as error:
        inner: BaseException = error
        while isinstance(inner, WRAPPERS) and inner.__cause__ is not None:
            inner = inner.__cause__
        raise inner from inner.__cause__
