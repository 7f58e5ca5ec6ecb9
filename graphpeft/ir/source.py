"""The line of the model's own code that a node of a captured graph comes from."""

from __future__ import annotations

import linecache
import re
from pathlib import PurePath

from torch import fx, nn


def frames(node: fx.Node, owner: nn.Module | None = None) -> list[tuple[str, int]]:
    """Files and lines that led to a node, innermost last, without the frames of torch.

    If `owner` is a leaf of the model with its own code, such as GPT-2's Conv1D, its frame is left out too, because its
    caller says more.
    """
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [(file, int(line)) for file, line in found if "torch" not in PurePath(file).parts]
    if owner is not None and not any(owner.children()) and not type(owner).__module__.startswith("torch."):
        own = own[:-1] or own
    return own


def location(node: fx.Node, owner: nn.Module | None = None) -> str:
    """`file.py:line`; empty if the capture does not know it."""
    own = frames(node, owner)
    return f"{PurePath(own[-1][0]).name}:{own[-1][1]}" if own else ""


def code_of(node: fx.Node, owner: nn.Module | None = None) -> str:
    """That line itself; empty if its file cannot be read."""
    own = frames(node, owner)
    return linecache.getline(*own[-1]).strip() if own else ""


def runner(node: fx.Node, model: nn.Module) -> nn.Module | None:
    """The innermost module of the captured model that ran the node."""
    stack = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    path = stack[-1].partition("@")[0] if stack else ""
    try:
        return model.get_submodule(path)
    except AttributeError:  # a module that only the captured code knows
        return None
