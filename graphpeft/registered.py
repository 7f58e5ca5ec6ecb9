"""What modules register where they are defined, known without importing them: `registered.json` is generated.

Help and completion must not wait for torch, and a pass, a method or a role is only known once its module is imported. So
`python -m graphpeft.generate` imports all of them and writes down what it finds; a test compares.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from graphpeft.tracing import PASSES


@cache
def _generated() -> dict[str, Any]:
    found = json.loads(files("graphpeft").joinpath("registered.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def passes() -> dict[str, str]:
    """Names of passes with a line of help each, also of those that another package registered."""
    return _generated()["passes"] | PASSES


def methods() -> tuple[str, ...]:
    """Names of the methods that come with graphpeft."""
    return tuple(_generated()["methods"])


def targets() -> tuple[str, ...]:
    """Roles and aliases, as targets of rules."""
    return tuple(_generated()["targets"])
