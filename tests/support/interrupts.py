"""Ctrl-C at a chosen line of graphpeft."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import graphpeft as gp

OURS = (str(Path(str(gp.__file__)).parent),)


def interrupted(run: Callable[[], Any], at: int) -> int | None:
    """Run with a KeyboardInterrupt at the line of graphpeft that is executed as number `at`; how many there were, without one."""
    count = 0

    def line(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line"
        if event == "line" and count == at:
            raise KeyboardInterrupt
        return line

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: line if frame.f_code.co_filename.startswith(OURS) else None)
    try:
        run()
    except KeyboardInterrupt:
        return None
    finally:
        sys.settrace(before)
    return count
