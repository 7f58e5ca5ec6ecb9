"""`gp.report`: a model, its adapters and its graphs on one page."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from graphpeft.capturing.capture import Inputs
from graphpeft.errors import FileError
from graphpeft.inspect.report.collect import collect
from graphpeft.inspect.report.page import render
from graphpeft.passes.verify import Level


def report(model: nn.Module, path: str | os.PathLike[str], inputs: Inputs = None, *, verify: Level = "fast") -> Path:
    """Write an HTML file that needs no server and no network; returns its path. It appears whole or not at all.

    It shows the rules with what became of them, a table of sites, the graph of each kind of block before and after, and
    numbers by role and layer: how far updates have moved the weights, their effective ranks, and what gates chose.

    Args:
        model: adapted or plain; on the meta device the numbers are left out.
        path: the file to write, which is replaced if there is one.
        inputs: an example call, if none can be made from the model's config.
        verify: which checks run for the page (see `graphpeft.verify`).

    Raises: `CaptureError`; `FileError` for a path that is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise FileError(f"{target} is a folder. Name the file, as in {target / 'report.html'}.")
    text = render(collect(model, inputs, verify))
    aside = target.with_name(f".{target.name}.part")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
    return target
