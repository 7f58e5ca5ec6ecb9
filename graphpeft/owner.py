"""Owner graphs: the one place where adapters enter a model.

A site's *owner* is the smallest module whose own FX graph contains the projection; for an exported program it is
the root. An owner is rewritten by tracing it, inserting each active branch after its projection, and giving the
module a subclass of its class whose `forward` is the generated code. Because the module object stays the same,
everything that refers to it (tied modules, optimizers, hooks, `isinstance`) keeps working, and its weights keep
their names. The rewritten graph is a pure function of (base graph, active branches): nothing is edited twice, and
restoring the class restores the base model to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import fx, nn

from graphpeft.errors import AdapterError
from graphpeft.graph import insert_branch, projections, strip_checks, trace
from graphpeft.mode import set_mode
from graphpeft.program import Program, Site, stored

HOME = "adapters"
"""Attribute of an owner under which its adapters live."""


class Adapters(nn.Module):
    """What an owner knows of its adapters: per adapter a `ModuleDict` of branches, and which adapters are active."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, dict[str, Site]] = {}
        self.active: tuple[str, ...] = ()
        self.base: fx.Graph | None = None
        """The base graph of a `GraphModule` owner; other owners are traced anew from their own class."""
        self.mode: bool | None = None
        """For such an owner, the mode that `train()` or `eval()` asked for; `None` as long as neither was called."""
        self.refusals: dict[str, Any] = {}
        """The `train` and `eval` that torch.export put on the instance, which raise."""

    def add(self, name: str, site: Site, branch: nn.Module) -> None:
        if name not in self._modules:
            self.add_module(name, nn.ModuleDict())
            self.sites[name] = {}
        key = slot(site)
        cast(nn.ModuleDict, self._modules[name])[key] = branch
        self.sites[name][key] = site

    def drop(self, name: str) -> None:
        del self._modules[name], self.sites[name]
        self.active = tuple(a for a in self.active if a != name)

    def branches(self, name: str) -> Iterator[tuple[Site, nn.Module, str]]:
        """(site, branch, path of the branch below the owner) of one adapter."""
        modules = cast(nn.ModuleDict, self._modules[name])
        for key, site in self.sites[name].items():
            yield site, modules[key], f"{HOME}.{name}.{key}"

    def running(self) -> list[tuple[Site, nn.Module, str]]:
        return [b for name in self.active for b in self.branches(name)]


def slot(site: Site) -> str:
    """Name of a site's branch inside its owner: the role, after the weight's path where one owner has several."""
    local = site.weight[len(site.owner) + 1 if site.owner else 0 :]
    return site.role if local == "weight" else f"{local.removesuffix('.weight').replace('.', '_')}_{site.role}"


class Adapted:
    """Mixin of every adapted module's class; `graph` is the rewritten graph, `base_class` the class it had before."""

    graph: fx.Graph | None
    base_class: type[nn.Module]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """After a change of dtype the casts in the graph may be wrong: lower again."""
        module = cast(nn.Module, self)
        before = {p.dtype for p in module.parameters()}
        result = cast(Any, super())._apply(fn, recurse)
        if {p.dtype for p in module.parameters()} != before:
            relower(module)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # The generated code refers to nothing but `self`, so a copy shares its class.
        clone = memo[id(self)] = type(self).__new__(type(self))
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.base_class, self.__dict__)


def _rebuild(base_class: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    module = base_class.__new__(base_class)
    module.__dict__.update(state)
    relower(module)
    return module


class AdaptedGraph(Adapted):
    """An adapted `GraphModule`: it can be switched between train and eval, and copies keep their adapters."""

    def train(self, mode: bool = True) -> Any:
        module = cast(fx.GraphModule, self)
        nn.Module.train(module, mode)
        cast(Adapters, home(module)).mode = mode
        if set_mode(module.graph, mode):
            module.recompile()
        return self

    def eval(self) -> Any:
        return self.train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A GraphModule compiles its code into its own class: a copy that shared the class would rewrite the original.
        clone = memo[id(self)] = self.base_class.__new__(self.base_class)
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        relower(clone)
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
            relower(cast(nn.Module, module))


STATE = "_graphpeft"
"""Attribute of the root model that holds its `State`; named here because copies must carry it along."""


def locate(program: Program, node: fx.Node, weight: str) -> tuple[str, Literal["branch", "weight"]]:
    """Path of the owner of a captured projection, and whether a branch can be inserted there."""
    if program.whole:
        return "", "branch"
    model = program.model
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    path = stack[-1].partition("@")[0] if stack else ""
    parameter = stored(model, weight)
    while path and not any(p is parameter for p in model.get_submodule(path).parameters()):
        path = path.rpartition(".")[0]
    if _traceable(model.get_submodule(path), parameter) and not _bypassed(model, path):
        return path, "branch"
    return weight.rpartition(".")[0], "weight"


def _traceable(owner: nn.Module, parameter: nn.Parameter) -> bool:
    if type(owner) is nn.Linear and "forward" not in owner.__dict__:
        return True
    graph = trace(owner)
    return graph is not None and bool(projections(owner, graph, parameter))


def _bypassed(model: nn.Module, path: str) -> bool:
    """Whether the module around reads the owner's weight past its `forward`, as the fused path of torch's encoder does."""
    parent = model.get_submodule(path.rpartition(".")[0]) if path else None
    return isinstance(parent, (nn.TransformerEncoderLayer, nn.MultiheadAttention))


# -- lowering ------------------------------------------------------------------------------------------------------


def home(owner: nn.Module) -> Adapters | None:
    """The owner's adapters, or `None` for a module that has none."""
    found = owner._modules.get(HOME)
    return found if isinstance(found, Adapters) else None


def settle(owner: nn.Module, path: str) -> Adapters:
    """The owner's adapters, made empty on first use."""
    existing = home(owner)
    if existing is not None:
        return existing
    if hasattr(owner, HOME):
        raise AdapterError(
            f"{path or type(owner).__name__} already has an attribute {HOME!r}, where graphpeft keeps its adapters. "
            f"Rename that attribute, or choose other sites."
        )
    fresh = Adapters()
    if isinstance(owner, fx.GraphModule):
        fresh.base = copy.deepcopy(owner.graph)
        fresh.refusals = {n: owner.__dict__.pop(n) for n in ("train", "eval") if n in owner.__dict__}
    owner.add_module(HOME, fresh)
    return fresh


def restore(owner: nn.Module) -> None:
    """Give the owner its own code back."""
    if isinstance(owner, Adapted):
        owner.__class__ = owner.base_class  # type: ignore[assignment]
    adapters = home(owner)
    if isinstance(owner, fx.GraphModule) and adapters is not None and adapters.base is not None:
        owner.graph = copy.deepcopy(adapters.base)


def vacate(owner: nn.Module, keep_mode: bool = False) -> Adapters | None:
    """Restore the owner and take its adapters off the module tree; returns them.

    A graph module goes back to the mode that it was exported in, or with `keep_mode` stays in the one it has.
    """
    restore(owner)
    adapters = cast("Adapters | None", owner._modules.pop(HOME, None))
    if adapters is not None:
        owner.__dict__.update(adapters.refusals)
        if keep_mode and adapters.mode is not None:
            graph_module = cast(fx.GraphModule, owner)
            set_mode(graph_module.graph, adapters.mode)
            graph_module.recompile()
    return adapters


def reoccupy(owner: nn.Module, adapters: Adapters) -> None:
    """Put adapters that `vacate` took off back on, with none active."""
    first = next(owner.parameters(), None)
    owner.add_module(HOME, adapters if first is None else adapters.to(first.device))
    for name in adapters.refusals:
        owner.__dict__.pop(name, None)
    adapters.active = ()
    relower(owner)


def relower(owner: nn.Module) -> None:
    """Rewrite the owner from its base graph and its active branches."""
    restore(owner)
    adapters = home(owner)
    if isinstance(owner, fx.GraphModule) and adapters is not None:
        graph = lower(owner, adapters)
        if adapters.mode is not None:
            set_mode(graph, adapters.mode)
        _inject(owner, {"__call__": _call}, AdaptedGraph)
        owner.graph = graph
        return
    if adapters is None or not adapters.running():
        return
    if any(site.form == "weight" for site, _, _ in adapters.running()):
        _inject(owner, _weight_form(owner, adapters))
        return
    key = _signature(owner, adapters) if type(owner) is nn.Linear else None
    if key is not None and key in _lowered:
        owner.__class__ = _lowered[key]
        return
    graph = lower(owner, adapters)
    code = fx.GraphModule(owner, graph, type(owner).__name__)
    _inject(owner, {"forward": type(code).forward, "graph": graph, "code": code.code})
    if key is not None:
        _lowered[key] = type(owner)


_lowered: dict[Hashable, type[nn.Module]] = {}
"""Classes made for `nn.Linear` owners. Their code refers to `self` alone, so equal layers share one class."""
_BOOKKEEPING = frozenset(nn.Module().__dict__)


def _signature(owner: nn.Module, adapters: Adapters) -> Hashable:
    """Everything that the lowered code of an `nn.Linear` depends on: its bias, dtype and the make-up of its branches."""
    branches = tuple((path, site.rows, _make_up(branch)) for site, branch, path in adapters.running())
    return tuple((n, p.dtype) for n, p in owner.named_parameters(recurse=False)), branches


def _make_up(module: nn.Module) -> Hashable:
    own = {k: repr(v) for k, v in module.__dict__.items() if k not in _BOOKKEEPING}
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    held = tuple((n, isinstance(t, nn.Parameter), tuple(t.shape), t.dtype) for n, t in tensors)
    return type(module), tuple(sorted(own.items())), held, tuple((n, _make_up(m)) for n, m in module.named_children())


def _inject(owner: nn.Module, members: Mapping[str, Any], mixin: type = Adapted) -> None:
    base = type(owner)
    names = {"base_class": base, "__module__": __name__, "__doc__": f"{base.__name__} with adapters."}
    owner.__class__ = type(f"Adapted{base.__name__.removesuffix('Impl')}", (mixin, base), {**names, **members})


def lower(owner: nn.Module, adapters: Adapters) -> fx.Graph:
    """The owner's base graph with every active branch inlined after its projection."""
    base = adapters.base if adapters.base is not None else trace(owner)
    graph = fx.Graph() if base is None else strip_checks(copy.deepcopy(base))
    for site, branch, path in adapters.running():
        parameter = _parameter(owner, site)
        found = projections(owner, graph, parameter)
        if not found:
            raise AdapterError(
                f"The code of {site.owner or type(owner).__name__} has no projection by {site.weight}, so its adapter would be "
                f"ignored. Usually the file was made for another version of the model, or `forward` was replaced on the "
                f"instance. Apply the rules anew, or take the replacement off first."
            )
        for node, source in found:
            insert_branch(graph, node, source, site, branch, path, parameter.dtype)
    graph.lint()
    return graph


def _parameter(owner: nn.Module, site: Site) -> nn.Parameter:
    local = site.weight[len(site.owner) + 1 if site.owner else 0 :]
    return stored(owner, local)


def _weight_form(owner: nn.Module, adapters: Adapters) -> dict[str, Any]:
    """Properties that return weight + delta under the weight's own name; the parameter itself stays where it is."""
    by_weight: dict[str, list[tuple[Site, nn.Module]]] = {}
    for site, branch, _ in adapters.running():
        by_weight.setdefault(site.weight.rpartition(".")[2], []).append((site, branch))
    return {"graph": None} | {name: property(_adapted_weight(name, tuple(found))) for name, found in by_weight.items()}


def _adapted_weight(name: str, found: tuple[tuple[Site, nn.Module], ...]) -> Any:
    places = tuple((site, slot(site)) for site, _ in found)

    def read(self: nn.Module) -> torch.Tensor:
        weight = cast(torch.Tensor, self._parameters[name])
        adapters = cast(Adapters, self._modules[HOME])
        for adapter in adapters.active:
            modules = cast(nn.ModuleDict, adapters._modules[adapter])
            for site, key in places:
                if key in modules:
                    weight = fold(weight, site, cast(Any, modules[key]).delta())
        return weight

    return read


def fold(weight: torch.Tensor, site: Site, delta: torch.Tensor) -> torch.Tensor:
    """weight + delta, summed in the wider dtype and cast last; `weight` itself is not changed. delta is (out, in)."""
    if site.transposed:
        delta = delta.t()
    wide = torch.promote_types(weight.dtype, delta.dtype)
    return (weight.to(wide) + delta.to(wide)).to(weight.dtype)
