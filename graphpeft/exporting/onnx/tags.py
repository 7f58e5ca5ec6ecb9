"""Where a node belongs, written into its metadata, which viewers such as netron show: its module, and its adapter's site."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphpeft.runtime.layout import AdapterInput
from graphpeft.tracing import as_pass

SCOPES = "pkg.torch.onnx.name_scopes"
"""As torch's exporter writes them: the paths of the modules around a node, outermost first, and the node's own name."""
SITE, ADAPTER = "graphpeft.site", "graphpeft.adapter"


@as_pass("tags", "nodes of adapters marked as such")
def tag(model: ir.Model, slots: Sequence[AdapterInput]) -> None:
    """Tag what reads a slot with its site; a node that a pass made is where what it reads comes from."""
    # Of a slot that several weights share, each B is for one of them.
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
