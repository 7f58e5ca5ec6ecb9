"""Owners: the modules that adapters change.

A site's *owner* is the smallest module whose own code contains the projection; for an exported program it is the root. While
adapters run, the owner has a subclass of its class, made for what runs. Because the module object stays the same, everything
that refers to it (tied modules, optimizers, hooks, `isinstance`) keeps working, and its weights keep their names. The class is
a pure function of the owner's own class and its active branches: nothing is edited twice, and giving the owner its own class
back restores the base model to the bit.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import fx, nn

from graphpeft.chain import Chain
from graphpeft.compat.accelerate import become, has_instance_forward
from graphpeft.compat.fake_tensors import fill_shapes
from graphpeft.compat.graph_modules import put_graph
from graphpeft.compat.quantized import KEPT, Kept, packed
from graphpeft.compat.sharded import sharded
from graphpeft.errors import AdapterError
from graphpeft.rewrite.adapters import HOME, Adapters, Installed, home
from graphpeft.rewrite.generated import compiled
from graphpeft.rewrite.kinds import kind_of
from graphpeft.rewrite.lowered import lowered, no_use
from graphpeft.rewrite.mode import set_mode
from graphpeft.rewrite.weight_form import weight_form


class Adapted:
    """Mixin of every adapted module's class; `graph` is the rewritten graph, `base_class` the class it had before."""

    graph: fx.Graph | None
    base_class: type[nn.Module]
    dtypes: frozenset[torch.dtype]
    """Of the parameters when the graph was made."""
    reads: frozenset[str] = frozenset()
    """Paths of the branches that act through the weights that the owner's code reads."""

    @property
    def code(self) -> str:
        """The text of the rewritten graph; empty where the owner runs its own code."""
        return str(self.graph.python_code("self").src) if self.graph is not None else ""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """After a change of dtype the casts in the graph may be wrong: install anew."""
        module = cast(nn.Module, self)
        result = cast(Any, super())._apply(fn, recurse)
        # Compared with the graph, not with before the call: a tied weight was changed with its first holder.
        if _dtypes(module) != self.dtypes:
            install(module)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # The code refers to nothing but `self`, so a copy shares its class.
        clone = memo[id(self)] = type(self).__new__(type(self))
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The module comes first and its state after: the state of a root refers to the module itself.
        return _empty, (self.base_class,), self.__dict__, None, None, _rebuilt


def _dtypes(module: nn.Module) -> frozenset[torch.dtype]:
    return frozenset(p.dtype for p in module.parameters())


def _empty(base_class: type[nn.Module]) -> nn.Module:
    return base_class.__new__(base_class)


def _rebuilt(module: nn.Module, state: dict[str, Any]) -> None:
    module.__dict__.update(state)
    install(module)


class AdaptedGraph(Adapted):
    """An adapted `GraphModule`: it can be switched between train and eval, and copies keep their adapters."""

    def recompile(self) -> Any:
        """Compile the graph into the class that is this module's alone."""
        graph = cast(fx.GraphModule, self).graph
        cast(Any, type(self)).forward = compiled(graph)
        return graph.python_code("self")

    def train(self, mode: bool = True) -> Any:
        module = cast(fx.GraphModule, self)
        nn.Module.train(module, mode)
        cast(Adapters, home(module)).mode = mode
        install(module)  # another graph: this one may be wanted again
        return self

    def eval(self) -> Any:
        return self.train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A GraphModule compiles its code into its own class: a copy that shared the class would rewrite the original.
        clone = memo[id(self)] = self.base_class.__new__(self.base_class)
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        adapters = cast(Adapters, home(clone))
        clone.graph = cast(Any, adapters.base_graph)
        install(clone)
        return clone


def _call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What an adapted graph's class calls: `fx.GraphModule` wraps it, and would otherwise wrap its base's wrapper."""
    return nn.Module.__call__(self, *args, **kwargs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The adapted graph modules of a model in eval mode for a while, where setting `training` would not do it."""
    modes = {m: cast(Adapters, home(m)).mode for m in model.modules() if isinstance(m, AdaptedGraph)}
    for module in modes:
        module.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            cast(Adapters, home(cast(nn.Module, module))).mode = mode
            install(cast(nn.Module, module))


def refuse_replaced(owner: nn.Module) -> None:
    """Raise `AdapterError` if other code on the instance hides the owner's graph, and would go on as it is."""
    if isinstance(owner, Adapted) and owner.graph is not None and has_instance_forward(owner):
        raise AdapterError(
            f"`forward` of a {owner.base_class.__name__} was replaced on the instance after its adapters came, and would go on "
            f"as it is. Usually accelerate prepared the model for mixed precision. Take that off first: "
            f"accelerator.unwrap_model(model, keep_fp32_wrapper=False)."
        )


MADE = frozenset({"__dict__", "__weakref__", "forward", "__call__", "_wrapped_call"})
"""Members of a class that Python or `fx.GraphModule` makes anew."""


def without_adapters(kind: type) -> type[nn.Module]:
    """A class without adapters; what was put on top of them meanwhile, as FSDP2 does, stays."""
    if "base_class" in kind.__dict__:
        return cast(type[nn.Module], kind.base_class)  # type: ignore[attr-defined]
    if not issubclass(kind, Adapted):
        return kind  # type: ignore[return-value]
    bases = tuple(without_adapters(base) for base in kind.__bases__)
    members = {name: value for name, value in kind.__dict__.items() if name not in MADE}
    if issubclass(kind, fx.GraphModule):
        members["__call__"] = _call
    return cast(type[nn.Module], cast(Any, type(kind))(kind.__name__.replace("Adapted", "", 1), bases, members))


def restore(owner: nn.Module) -> None:
    """Give the owner its own code back."""
    if isinstance(owner, Adapted):
        become(owner, without_adapters(type(owner)))
    adapters = home(owner)
    if isinstance(owner, fx.GraphModule) and adapters is not None and adapters.base_graph is not None:
        put_graph(owner, adapters.base_graph)


def detach(owner: nn.Module, keep_mode: bool = False) -> Adapters | None:
    """Restore the owner and take its adapters off the module tree; returns them.

    A graph module goes back to the mode that it was exported in, or with `keep_mode` stays in the one it has.
    """
    restore(owner)
    found = home(owner)
    if found is not None:
        found.detached = True
    adapters = cast("Adapters | None", owner._modules.pop(HOME, None))
    if adapters is not None:
        owner.__dict__.update(adapters.refusals)
        if keep_mode and adapters.mode is not None:
            graph_module = cast(fx.GraphModule, owner)
            graph_module.graph = copy.deepcopy(graph_module.graph)
            set_mode(graph_module.graph, adapters.mode)
            graph_module.recompile()
    return adapters


def attach(owner: nn.Module, adapters: Adapters) -> None:
    """Put adapters that `detach` took off back on, with none active."""
    first, mine = (next(module.parameters(), None) for module in (owner, adapters))
    if first is not None and (mine is None or mine.device != first.device):
        adapters.to(first.device)
    owner.add_module(HOME, adapters)
    adapters.detached = False
    for name in adapters.refusals:
        owner.__dict__.pop(name, None)
    adapters.active = ()
    adapters.train(owner.training)  # it may have changed meanwhile
    if isinstance(owner, fx.GraphModule) and adapters.base_graph is not None and owner.graph is not adapters.base_graph:
        owner.graph = adapters.base_graph  # `keep_mode` compiled another one into the class


def install(owner: nn.Module, thorough: bool = True) -> None:
    """Let the owner run its active branches: give it the class for them, made now if it is not at hand.

    Without `thorough` a class that was made before is taken as long as the container has seen no change.

    Raises `AdapterError`, and leaves the owner as it was, if its code has no use of an adapted weight.
    """
    adapters = home(owner)
    if adapters is None or not (adapters.active or isinstance(owner, fx.GraphModule)):
        restore(owner)
        return
    state = adapters.active, adapters.by_row is not None, adapters.mode
    known = adapters.installed.get(state)
    if not thorough and known is not None and known.change == adapters.changes and known.graph is None:
        own = without_adapters(type(owner)) is known.wanted[0]
        if own:
            become(owner, known.kind)
            return
    wanted = _wanted(owner, adapters)
    if known is None or known.wanted != wanted:
        before = type(owner), getattr(owner, "graph", None)
        restore(owner)
        try:
            known = Installed(wanted, *_built(owner, adapters), adapters.changes)
        except BaseException:
            become(owner, before[0])
            if isinstance(owner, fx.GraphModule):
                put_graph(owner, cast(fx.Graph, before[1]))
            raise
        adapters.remember(state, known)
    if type(owner) is not known.kind:
        restore(owner)
        become(owner, known.kind)
    if known.graph is not None:
        put_graph(cast(fx.GraphModule, owner), known.graph)


def _wanted(owner: nn.Module, adapters: Adapters) -> tuple[Any, ...]:
    """What the owner's code depends on: its own class and mode, the dtypes, and the modules that the branches are made of."""
    parts = [*adapters.running_modules()]
    kinds = {p.dtype for module in (owner, *parts) for p in module._parameters.values() if p is not None}
    return without_adapters(type(owner)), frozenset(kinds), adapters.mode, tuple(parts)


def _built(owner: nn.Module, adapters: Adapters) -> tuple[type[nn.Module], fx.Graph | None]:
    """The class that runs the active branches of an owner that has its own class now, and a graph module's graph."""
    kind = kind_of(owner)
    if kind == "graph":
        graph = lowered(owner, adapters)
        # Nobody looks at shapes while rows differ, nor in a sharded model, where they are those of parts.
        if adapters.by_row is None and not sharded(owner):
            fill_shapes(graph, owner)
        if adapters.mode is not None:
            set_mode(graph, adapters.mode)
        return _subclass(owner, {"__call__": _call, "forward": compiled(graph)}, AdaptedGraph), graph
    _refuse_hidden(owner, adapters)
    forms = {"weight" if kind == "code" or adapters.opaque else site.form for site, _, _ in adapters.running()}
    key = _signature(owner, adapters) if type(owner) is nn.Linear and forms == {"branch"} else None
    if key is not None and key in _shared:
        return _shared[key], None
    members: dict[str, Any] = {"forward": type(owner).forward, "graph": None}
    if "branch" in forms:
        members |= _layer(owner, adapters)
    if "weight" in forms:
        members |= weight_form(adapters, members["forward"])
    made = _subclass(owner, members)
    if key is not None:
        _shared[key] = made
    return made, None


def _refuse_hidden(owner: nn.Module, adapters: Adapters) -> None:
    """A `forward` on the instance hides the class's, in which the projection was found: it may have no use of the weight."""
    sites = [site for site, _, _ in adapters.running() if site.form == "branch"]
    if sites and has_instance_forward(owner) and not adapters.opaque:
        raise AdapterError(no_use(owner, sites[0]))


def _layer(owner: nn.Module, adapters: Adapters) -> dict[str, Any]:
    kept = packed(owner)
    if kept:  # FX asks for all that a graph reads, and the class that has it is yet to be made
        owner.__dict__[KEPT] = None
    try:
        graph = lowered(owner, adapters)
    finally:
        if kept:
            del owner.__dict__[KEPT]
    members = {"forward": compiled(graph), "graph": graph}
    return members | ({KEPT: property(Kept)} if kept else {})


_shared: weakref.WeakValueDictionary[Hashable, type[nn.Module]] = weakref.WeakValueDictionary()
"""Classes made for `nn.Linear` owners. Their code refers to `self` alone, so equal layers share one class."""
_BOOKKEEPING = frozenset(nn.Module().__dict__)
_READ_LATE = frozenset({"scale", "strength"})
"""What code reads of a chain when it runs."""


def _signature(owner: nn.Module, adapters: Adapters) -> Hashable:
    """Everything that the code of an `nn.Linear` depends on: its bias, dtype and the make-up of its branches."""
    branches = tuple((path, site.rows, _make_up(branch)) for site, branch, path in adapters.running())
    held = tuple((n, p.dtype) for n, p in owner.named_parameters(recurse=False))
    return held, _dtypes(owner), branches, adapters.by_row is None


def _make_up(module: nn.Module) -> Hashable:
    late = _READ_LATE if isinstance(module, Chain) else frozenset()
    own = {k: repr(v) for k, v in module.__dict__.items() if k not in _BOOKKEEPING and k not in late}
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    held = tuple((n, isinstance(t, nn.Parameter), tuple(t.shape), t.dtype) for n, t in tensors)
    return type(module), tuple(sorted(own.items())), held, tuple((n, _make_up(m)) for n, m in module.named_children())


def _subclass(owner: nn.Module, members: Mapping[str, Any], mixin: type = Adapted) -> type[nn.Module]:
    base = type(owner)
    about = f"{base.__name__} with adapters."
    names = {"base_class": base, "dtypes": _dtypes(owner), "__module__": __name__, "__doc__": about}
    return cast(
        type[nn.Module], type(f"Adapted{base.__name__.removesuffix('Impl')}", (mixin, base), {**names, **members})
    )
