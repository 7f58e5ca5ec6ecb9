"""Parameters that FSDP2 shards over several processes: gather them, shard them again, and write files once."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch import distributed as dist

from graphpeft.errors import AdapterError

ELSEWHERE = "Save the adapter with gp.save, in every process, load it on the base in one process, and do it there."
# torch.distributed's tensors take a second to import, so the functions below import them only if there are processes.


def sharded(model: nn.Module) -> bool:
    """Whether the parameters are sharded over processes, also while FSDP2 keeps some gathered between passes."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    return bool(_units(model)) or any(map(_split, model.parameters()))


def _units(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _split(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Any) -> Tensor:
    """The full tensor. Every process must call this for a sharded one; gradients flow back to the shards."""
    return tensor.full_tensor() if _split(tensor) else tensor


def shard_like(value: Tensor, parameter: Any) -> Tensor:
    """Shard a full tensor, which every process has, like a parameter of its shape."""
    if not _split(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Without a source rank, each process takes its shard from its own copy.
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def reshard(model: nn.Module) -> None:
    """Make the shards the model's parameters again, where FSDP2 kept full ones after a forward pass."""
    for unit in _units(model) if sharded(model) else ():
        unit.reshard()


@contextmanager
def gathered(model: nn.Module, inside: Iterable[nn.Module]) -> Iterator[None]:
    """Gather the parameters of some modules of a sharded model inside the context; every process must enter it."""
    _refuse_flat(model)
    if not sharded(model):
        yield
        return
    reshard(model)
    held = {(m, n): p for m in inside for n, p in m._parameters.items() if p is not None and _split(p)}
    made = {parameter: full_tensor(parameter) for parameter in dict.fromkeys(held.values())}
    try:
        for (module, name), parameter in held.items():
            module._parameters[name] = made[parameter]  # type: ignore[assignment]
        yield
    finally:
        for (module, name), parameter in held.items():
            module._parameters[name] = parameter


def written(model: nn.Module, folder: Path, write: Callable[[Path], object]) -> None:
    """Call `write(folder)`. On a sharded model call it in every process: gathering is collective. Only rank 0's files
    are kept; its errors are raised everywhere."""
    _refuse_flat(model)
    if not sharded(model):
        write(folder)
        return
    failure: list[Exception | None] = [None]
    with tempfile.TemporaryDirectory() as beside:
        try:
            write(folder if dist.get_rank() == 0 else Path(beside))
        except Exception as error:
            failure = [error]
    first = [*failure]
    dist.broadcast_object_list(first, 0)
    if raised := failure[0] or first[0]:
        raise raised


def refuse_sharded(model: nn.Module, action: str, instead: str) -> None:
    """Raise `AdapterError` if the parameters are sharded over processes."""
    _refuse_flat(model)
    if sharded(model):
        raise AdapterError(
            f"Cannot {action}: {type(model).__name__} is sharded over {dist.get_world_size()} processes, each of which holds "
            f"parts of its parameters. {instead}"
        )


FLAT = "_is_fsdp_managed_module"
"""FSDP1 and FSDP2 set this attribute on every module that they manage. It is private to torch; a test checks it."""


def in_flat_shards(module: nn.Module) -> bool:
    """Whether FSDP1 or FSDP2 manages the module: the parameters of the first are pieces of a flat tensor."""
    return bool(getattr(module, FLAT, False))


def _refuse_flat(model: nn.Module) -> None:
    """Raise `AdapterError` for a model in FSDP1, whose parameters are pieces of a flat tensor but look plain."""
    if not dist.is_available() or not dist.is_initialized() or sharded(model):
        return
    if any(map(in_flat_shards, model.modules())):
        raise AdapterError(
            f"{type(model).__name__} is in FullyShardedDataParallel (FSDP1), and only FSDP1 can gather its parameters. "
            f"Training works; to save, merge or change adapters, shard with fully_shard (FSDP2) instead."
        )
