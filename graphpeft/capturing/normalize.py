"""Normalize: remove the nodes that only the capture needed, before anything is matched."""

from __future__ import annotations

from graphpeft.ir.program import Program
from graphpeft.rewrite.graph import strip_checks
from graphpeft.tracing import as_pass


@as_pass("normalize", "strip operators that only the capture added")
def normalize(program: Program) -> Program:
    """Erase run-time checks and the nodes that only they use. The program computes the same results."""
    strip_checks(program.graph)
    program.graph.eliminate_dead_code()
    return program
