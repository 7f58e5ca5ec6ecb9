"""Former names of members, for methods outside of this package: they still answer, with a `DeprecationWarning`."""

from __future__ import annotations

import warnings
from typing import Any


def renamed(old: str, new: str) -> property:
    """The member `new` under its former name."""

    def get(self: Any) -> Any:
        warnings.warn(f"{type(self).__name__}.{old} is called {new} now.", DeprecationWarning, stacklevel=2)
        return getattr(self, new)

    return property(get)
