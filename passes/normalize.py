"""Normalize: strip what a capture adds for its own sake, before anything is matched."""

from __future__ import annotations

from graphpeft.graph import strip_checks
from graphpeft.program import Program
from graphpeft.steps import named


@named("normalize")
def normalize(program: Program) -> Program:
    """Erase run-time checks and the nodes that only they used. The program computes what it did before."""
    strip_checks(program.graph)
    program.graph.eliminate_dead_code()
    return program
