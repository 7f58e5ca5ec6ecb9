"""Every error that graphpeft raises on purpose, under one base class.

A message names the place and states the broken rule, the usual cause and the remedy. An operation that raises one
of these leaves the model and the files as they were.
"""

from __future__ import annotations


class GraphPeftError(Exception):
    """Base class of all errors raised on purpose by graphpeft."""


class RuleError(GraphPeftError, ValueError):
    """A rule text or rule object cannot be understood."""


class CaptureError(GraphPeftError):
    """A model cannot be captured as an FX graph."""


class MatchError(GraphPeftError):
    """A rule matched nothing, or not as many sites as expected."""


class AdapterError(GraphPeftError):
    """An adapter cannot be added, activated, merged or removed in the model's current state."""


class FileError(GraphPeftError):
    """An adapter file is corrupt, foreign, or does not fit the model."""


class ExportError(GraphPeftError):
    """A model cannot be exported, or the exported graph does not do what PyTorch does."""


class VerifyError(GraphPeftError):
    """A check after a pass failed."""
