"""ATen operators, as the nodes of a captured graph call them: `torch._ops.OpOverload`, which has no public name."""

from __future__ import annotations

from typing import Any, TypeGuard

from torch._ops import OperatorBase, OpOverload

__all__ = ["OperatorBase", "is_aten", "is_mutable", "plain_name"]


def is_aten(target: Any) -> TypeGuard[OpOverload]:
    """Whether a node's target is an operator of ATen, or a custom one."""
    return isinstance(target, OpOverload)


def plain_name(operator: OpOverload) -> str:
    """`add` for `aten::add.Tensor`."""
    return operator._schema.name.split("::")[1]


def is_mutable(operator: OpOverload) -> bool:
    """Whether the operator writes into one of its arguments."""
    return bool(operator._schema.is_mutable)
