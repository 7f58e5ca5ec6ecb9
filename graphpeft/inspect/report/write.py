"""`gp.report`: write a page about a model, its adapters and its graphs."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from graphpeft.capturing.capture import Inputs
from graphpeft.errors import FileError
from graphpeft.files.atomic import write
from graphpeft.inspect.report.collect import collect
from graphpeft.inspect.report.page import render
from graphpeft.passes.verify import Level
from graphpeft.rewrite.entry import on_model


@on_model()
def report(model: nn.Module, path: str | os.PathLike[str], inputs: Inputs = None, *, verify: Level = "fast") -> Path:
    """Write an HTML file that needs no server and no network; returns its path. It appears complete or not at all.

    It shows the rules and their outcomes, a table of sites, the graph of each kind of block before and after, and
    statistics by role and layer: sizes of updates, their effective ranks, and the choices of gates.

    Args:
        model: a model with or without adapters; on the meta device the statistics are left out.
        path: the file to write; an existing file is replaced.
        inputs: an example call; default: made from the model's config.
        verify: the level of the checks on the page (see `graphpeft.verify`).

    Raises: `CaptureError`; `FileError` if the path is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise FileError(f"{target} is a folder. Name the file, as in {target / 'report.html'}.")
    write(target, render(collect(model, inputs, verify)).encode())
    return target
