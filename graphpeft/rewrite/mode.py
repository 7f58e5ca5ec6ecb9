"""Train and eval mode of an exported graph.

`torch.export` bakes the mode into the operators, and its modules refuse `train()` and `eval()`. Here the flags are
edited: dropout keeps its probability and changes its flag, attention's `dropout_p` goes to 0 and back, batch norm
changes its flag.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from graphpeft.match.products import op

TRAIN_FLAG = {
    "dropout": 2,
    "dropout_": 2,
    "feature_dropout": 2,
    "alpha_dropout": 2,
    "batch_norm": 5,
    "instance_norm": 5,
}
"""Position of the boolean `train` argument."""
DROPOUT_P = 4
"""Position of scaled_dot_product_attention's `dropout_p`."""
KEPT = "graphpeft.dropout_p"


def set_mode(graph: fx.Graph, training: bool) -> bool:
    """Switch every mode-dependent operator of an ATen graph, in place; returns whether anything changed.

    An attention that was exported in eval mode carries no dropout probability, so there is none to switch on.
    """
    changed = False
    for node in graph.nodes:
        name = op(node)
        if name in TRAIN_FLAG and len(node.args) > TRAIN_FLAG[name]:
            changed |= _set(node, TRAIN_FLAG[name], "training", training)
        elif name == "scaled_dot_product_attention":
            present = node.args[DROPOUT_P] if len(node.args) > DROPOUT_P else node.kwargs.get("dropout_p", 0.0)
            kept = node.meta.setdefault(KEPT, present)
            changed |= _set(node, DROPOUT_P, "dropout_p", kept if training else 0.0)
    return changed


def _set(node: fx.Node, position: int, keyword: str, value: Any) -> bool:
    if len(node.args) > position:
        old = node.args[position]
        node.update_arg(position, value)
        return bool(old != value)
    if keyword not in node.kwargs:
        return False
    old = node.kwargs[keyword]
    node.update_kwarg(keyword, value)
    return bool(old != value)
