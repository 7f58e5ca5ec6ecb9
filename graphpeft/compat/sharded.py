"""Parameters in shards, as FSDP2 keeps them over several processes: made whole, put back, and written down once."""

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
# torch.distributed's tensors take a second to import: only where there are processes.


def sharded(model: nn.Module) -> bool:
    """Whether the parameters are spread over processes, also while FSDP2 keeps some whole between passes."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    return bool(_units(model)) or any(map(_split, model.parameters()))


def _units(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _split(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Any) -> Tensor:
    """The tensor with all its values; of a sharded one every process has to ask, and gradients flow back to the shards."""
    return tensor.full_tensor() if _split(tensor) else tensor


def shard_like(value: Tensor, parameter: Any) -> Tensor:
    """A whole tensor that every process has, sharded as a parameter of its shape is."""
    if not _split(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Without a source to send it each process takes its part of its own.
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def reshard(model: nn.Module) -> None:
    """Have the shards be the model's parameters again, where FSDP2 kept whole ones after a forward pass."""
    for unit in _units(model) if sharded(model) else ():
        unit.reshard()


@contextmanager
def gathered(model: nn.Module, inside: Iterable[nn.Module]) -> Iterator[None]:
    """The parameters of some modules of a sharded model whole for a while; every process has to enter."""
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
    """Let `write` fill a folder. Of a sharded model every process has to call it, for what is written is gathered while it
    is written; the first one's is kept, and if that fails, all raise."""
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
    """Raise `AdapterError` if the parameters are spread over processes."""
    _refuse_flat(model)
    if sharded(model):
        raise AdapterError(
            f"Cannot {action}: {type(model).__name__} is sharded over {dist.get_world_size()} processes, each of which holds "
            f"parts of its parameters. {instead}"
        )


FLAT = "_is_fsdp_managed_module"
"""What both kinds of FSDP put on every module in their care. torch keeps it private; a test notices if it moves."""


def _refuse_flat(model: nn.Module) -> None:
    """Raise `AdapterError` for a model in FSDP1: its parameters are pieces of one flat tensor, and look like plain ones."""
    if not dist.is_available() or not dist.is_initialized() or sharded(model):
        return
    if any(getattr(module, FLAT, False) for module in model.modules()):
        raise AdapterError(
            f"{type(model).__name__} is in FullyShardedDataParallel (FSDP1), whose pieces of parameters nothing else can put "
            f"together. It trains there; to save, merge or change adapters, shard with fully_shard (FSDP2) instead."
        )
