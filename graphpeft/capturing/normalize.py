"""Normalize: strip what a capture adds for its own sake, before anything is matched."""

from __future__ import annotations

from graphpeft.ir.program import Program
from graphpeft.rewrite.graph import strip_checks
from graphpeft.tracing import as_pass


@as_pass("normalize", "strip what a capture adds for its own sake")
def normalize(program: Program) -> Program:
    """Erase run-time checks and the nodes that only they used. The program computes what it did before."""
    strip_checks(program.graph)
    program.graph.eliminate_dead_code()
    return program
