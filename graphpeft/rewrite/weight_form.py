"""What a module reads under the name of an adapted weight, and who is shown it.

Used where code reads a weight by itself, in a fused operator or in Python that may branch: see `carrier`. Only the model's own
computation is shown the adapted weight. Everything else that asks for the weight meets the parameter as it is stored:
`fully_shard` looks it up by name and shards what it finds, pruning and quantizers read it and write it back, and each of them
would fold ΔW into the base for good. Who is asking is told from the call stack (`_computing`): code outside of all modules, as
in a script, counts as a tool.

While torch.compile traces, the weight is plain W + ΔW: dynamo cannot follow a carrier that is made at each read.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from functools import wraps
from types import CodeType, FrameType
from typing import Any, cast

import torch
from torch import nn

from graphpeft.errors import AdapterError
from graphpeft.ir.site import Site
from graphpeft.rewrite.adapters import HOME, Adapters, slot
from graphpeft.rewrite.carrier import Carried, Reading, carrying

Named = tuple[str, str, Site]
"""The name of an adapter, that of a branch in it, and the branch's site."""

TOOLS = (
    "torch.distributed.", "torch.nn.utils.", "torch.nn.init", "torch.ao.", "torch.quantization.", "torch.optim.", "torchao.",
    "accelerate.", "deepspeed.", "bitsandbytes.", "transformers.modeling_utils", "transformers.initialization",
)  # fmt: skip
"""Code that looks after parameters, also while a model runs: in hooks around `forward`."""
HIDING = ("torch.nn.utils.parametrize", "torch.nn.utils.fusion")
"""Code that puts other weights in the place of what it reads, past which ΔW would be lost or be added to other numbers."""
UPKEEP = ("_init_weights", "init_weights", "reset_parameters", "tie_weights")
"""Methods of models that write weights."""


def weight_form(adapters: Adapters, forward: Callable[..., Any]) -> dict[str, Any]:
    """Members of a class whose instances show adapted weights under the weights' own names; the parameters stay.

    `forward` is what the class would run otherwise.
    """
    by_weight: dict[str, list[Named]] = {}
    listed: set[tuple[str, nn.Module]] = set()
    for adapter in adapters.active:
        for site, branch, _ in adapters.branches(adapter):
            leaf = site.weight.rpartition(".")[2]
            if (leaf, branch) not in listed:  # a table that is also the head has two places, and one branch
                listed.add((leaf, branch))
                by_weight.setdefault(leaf, []).append((adapter, slot(site), site))
    shown = {name: _property(name, tuple(places)) for name, places in by_weight.items()}
    reads = frozenset(path for _, _, path in adapters.running())
    return {**shown, "forward": _remembering(forward), "reads": reads}


class _Running(threading.local):
    """The owners whose `forward` runs in this thread, each with the sums W + ΔW that it has read."""

    def __init__(self) -> None:
        self.sums: dict[int, dict[tuple[str, bool], torch.Tensor]] = {}


_running = _Running()


def _remembering(forward: Callable[..., Any]) -> Any:
    """`forward` with each sum W + ΔW made once, when it is first read: loops over experts read theirs many times.

    A module around that reads the weight past this `forward`, as `nn.MultiheadAttention` does, has it made anew.
    """

    @wraps(forward)
    def remembering(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or id(self) in _running.sums:  # or the module calls itself
            return forward(self, *args, **kwargs)
        _running.sums[id(self)] = {}
        try:
            return forward(self, *args, **kwargs)
        finally:
            del _running.sums[id(self)]

    return remembering


def _property(name: str, places: tuple[Named, ...]) -> property:
    first = places[0][2]
    beside = all(site.form == "branch" for _, _, site in places)

    def read(self: nn.Module) -> torch.Tensor:
        tracing = torch.compiler.is_dynamo_compiling()
        sums = None if tracing else _running.sums.get(id(self))
        base = _base(self, name)
        if sums is None and not tracing and not _computing(first.weight):
            return base
        adapters = cast(Adapters, self._modules[HOME])
        carried = tuple(Carried(*place, adapters.branch(*place[:2])) for place in places)
        reading = Reading(base, self, carried, adapters.by_row, self.training)
        if beside and not tracing:
            return carrying(reading, base)
        # A weight made without gradients is not one to train with.
        key = name, torch.is_grad_enabled()
        if sums is not None and key in sums:
            return sums[key]
        try:
            weight = reading.dense()
        except AttributeError as error:  # Python would take it for a missing attribute, and nn.Module give the base
            raise RuntimeError(f"ΔW of {first.weight} cannot be computed: {error}") from error
        if sums is not None:
            sums[key] = weight
        return weight

    def write(self: nn.Module, value: Any) -> None:
        self.__dict__[name] = value

    def delete(self: nn.Module) -> None:
        self.__dict__.pop(name)

    return property(read, write, delete)


def _base(owner: nn.Module, name: str) -> torch.Tensor:
    """The weight as it is stored: a parameter, or the plain tensor that pruning and FSDP1 put in its place."""
    found = owner._parameters.get(name, owner.__dict__.get(name))
    if found is None:
        raise AttributeError(f"{type(owner).__name__!r} object has no attribute {name!r}")
    return found


def _computing(path: str) -> bool:
    """Whether the weight at `path` is asked for by a model that computes, rather than by a tool.

    It is called by a property, so the code that asks is two frames up. A parent may read the weight of its child in any helper,
    hence it is enough that a module computes further up: it is called, or its `forward` or another method of its own runs.
    Recomputation in a backward pass has no module above it, and is known by where it is done. Tools may be at work inside of all
    of that, as FSDP is in hooks around `forward`; their code is known by its package. Traced code asks in order to compute.

    Raises `AdapterError` for a parametrization and for fusion with a batch norm, before either has changed anything.
    """
    if torch.compiler.is_compiling() or cast(Any, torch.jit).is_tracing():
        return True
    frame: FrameType | None = sys._getframe(2)
    assert frame is not None, "a property is read by somebody"
    asking = _package(frame)
    if asking in HIDING:
        raise AdapterError(
            f"{path} is read as weight + ΔW, and {asking} would put another weight in its place: the adapter would be lost, or "
            f"be added to other numbers. Nothing was changed. Call gp.merge(model) or gp.remove(model) first."
        )
    if asking.startswith(TOOLS) or frame.f_code.co_name in UPKEEP:
        return False
    while frame is not None:
        if _computes(frame):
            return True
        frame = frame.f_back
    return False


def _computes(frame: FrameType) -> bool:
    code, package = frame.f_code, _package(frame)
    if (
        code is nn.Module.__call__.__code__
        or code.co_name in ("forward", "backward")
        or package == "torch.utils.checkpoint"
    ):
        return True
    if not code.co_varnames or package.startswith(TOOLS) or code.co_name in UPKEEP:
        return False
    first = frame.f_locals.get(code.co_varnames[0])
    own = first[0] if isinstance(first, tuple) and first else first  # of `*args`
    return isinstance(own, nn.Module) and _has_method(own, code)


def _has_method(module: nn.Module, code: CodeType) -> bool:
    """Whether the code is that of a method which the module has by itself, under whatever name."""
    kinds = [kind for kind in type(module).__mro__ if kind not in nn.Module.__mro__]
    held = [each for kind in kinds for each in vars(kind).values()] + list(vars(module).values())
    plain = (getattr(each, "__func__", getattr(each, "fget", each)) for each in held)
    return any(getattr(inspect.unwrap(each), "__code__", None) is code for each in plain if callable(each))


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))
