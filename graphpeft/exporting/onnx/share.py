"""One product with A for all sites that read the same activation: q, k and v, or gate and up.

A product with a narrow matrix costs little arithmetic, but one kernel launch. Concatenated, the As of several sites take
a single launch. Each B then has zeros in the rows of the other sites.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from graphpeft.exporting.onnx.census import products
from graphpeft.runtime.layout import AdapterInput, Slot, b_of, pair_slots
from graphpeft.tracing import as_pass


@as_pass("share", "merge the A products of slots that read the same activation")
def share(model: ir.Model, slots: Sequence[AdapterInput]) -> tuple[AdapterInput, ...]:
    """Rewrite the graph, and return its new slots in order. A slot with several call sites is not shared."""
    inputs = {value.name: value for value in model.graph.inputs}
    groups: dict[object, list[Slot]] = defaultdict(list)
    for slot in pair_slots(slots):
        readers = products(slot, inputs[slot.a])
        groups[(id(readers[0].inputs[0]), slot.inputs) if len(readers) == 1 else slot].append(slot)
    place = {id(node): number for number, node in enumerate(model.graph)}
    return tuple(group[0] if len(group) == 1 else _merged(model, group, inputs, place) for group in groups.values())


def _merged(
    model: ir.Model, group: Sequence[Slot], inputs: Mapping[str | None, ir.Value], place: Mapping[int, int]
) -> Slot:
    nodes = {slot: products(slot, inputs[slot.a])[0] for slot in group}
    kept = min(group, key=lambda slot: place[id(nodes[slot])])  # the first product in the graph precedes every use
    members = [member for slot in group for member in slot.members]
    members.sort(
        key=lambda member: place[id(products(kept, inputs[b_of(member[0])])[0])]
    )  # in graph order, independent of the order of adapters
    merged = replace(kept, members=tuple(members))
    for slot in group:
        for site, outputs in slot.members:
            inputs[b_of(site)].shape = ir.Shape([kept.rank, outputs])
        if slot is not kept:
            nodes[slot].outputs[0].replace_all_uses_with(nodes[kept].outputs[0])
            model.graph.remove(nodes[slot], safe=True)
            model.graph.inputs.remove(inputs[slot.a])
    inputs[kept.a].name = merged.a
    return merged
