"""Tag nodes with their module and their adapter's site, in metadata that viewers such as netron show."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphpeft.runtime.layout import AdapterInput
from graphpeft.tracing import as_pass

SCOPES = "pkg.torch.onnx.name_scopes"
"""The key that torch's exporter uses for the paths of a node's modules, outermost first, and the node's name."""
SITE, ADAPTER = "graphpeft.site", "graphpeft.adapter"


@as_pass("tags", "tag nodes with their module and adapter site")
def tag(model: ir.Model, slots: Sequence[AdapterInput]) -> None:
    """Tag nodes that read a slot with its site. Nodes made by passes inherit the scope of their inputs."""
    # In a slot that several weights share, each B belongs to one of them.
    sites = {
        name: name.partition(".lora_")[0] if ".lora_" in name else slot.label for slot in slots for name in slot.shapes
    }
    for node in model.graph:
        before = [value.producer() for value in node.inputs if value is not None]
        known = [one.metadata_props for one in before if one is not None]
        if SCOPES not in node.metadata_props:
            scopes = next((props[SCOPES] for props in known if SCOPES in props), None)
            if scopes is not None:
                node.metadata_props[SCOPES] = scopes
        read = [sites[str(value.name)] for value in node.inputs if value is not None and value.name in sites]
        if read:
            node.metadata_props.update({SITE: read[0], ADAPTER: "slot"})
