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
from typing import Any, cast

import torch
from torch import fx, nn

from graphpeft.compat.accelerate import become, has_instance_forward
from graphpeft.compat.fake_tensors import fill_shapes
from graphpeft.compat.quantized import KEPT, Kept, packed, weight_node
from graphpeft.compat.sharded import sharded
from graphpeft.errors import AdapterError
from graphpeft.ir.site import Site
from graphpeft.match.owners import Uses, forget_constants, trace
from graphpeft.names import unwritable
from graphpeft.rewrite.adapters import HOME, Adapters, adapted_parameter, home
from graphpeft.rewrite.graph import Splice, strip_checks
from graphpeft.rewrite.mode import set_mode
from graphpeft.rewrite.weight_form import weight_form


class Adapted:
    """Mixin of every adapted module's class; `graph` is the rewritten graph, `base_class` the class it had before."""

    graph: fx.Graph | None
    base_class: type[nn.Module]
    dtypes: frozenset[torch.dtype]
    """Of the parameters when the graph was made."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """After a change of dtype the casts in the graph may be wrong: lower again."""
        module = cast(nn.Module, self)
        result = cast(Any, super())._apply(fn, recurse)
        # Compared with the graph, not with before the call: a tied weight was changed with its first holder.
        if _dtypes(module) != self.dtypes:
            relower(module)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # The generated code refers to nothing but `self`, so a copy shares its class.
        clone = memo[id(self)] = type(self).__new__(type(self))
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.base_class, self.__dict__)


def _dtypes(module: nn.Module) -> frozenset[torch.dtype]:
    return frozenset(p.dtype for p in module.parameters())


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


def restore(owner: nn.Module) -> None:
    """Give the owner its own code back."""
    if isinstance(owner, Adapted):
        become(owner, _without(type(owner)))
        forget_constants(owner)
    adapters = home(owner)
    if isinstance(owner, fx.GraphModule) and adapters is not None and adapters.base_graph is not None:
        owner.graph = copy.deepcopy(adapters.base_graph)


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


def _without(kind: type) -> type[nn.Module]:
    """A class without adapters; what was put on top of them meanwhile, as FSDP2 does, stays."""
    if "base_class" in kind.__dict__:
        return cast(type[nn.Module], kind.base_class)  # type: ignore[attr-defined]
    bases = tuple(_without(base) if issubclass(base, Adapted) else base for base in kind.__bases__)
    members = {name: value for name, value in kind.__dict__.items() if name not in MADE}
    if issubclass(kind, fx.GraphModule):
        members["__call__"] = _call
    return cast(type[nn.Module], type(kind)(kind.__name__.replace("Adapted", "", 1), bases, members))


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
    first, mine = (next(module.parameters(), None) for module in (owner, adapters))
    if first is not None and (mine is None or mine.device != first.device):
        adapters.to(first.device)
    owner.add_module(HOME, adapters)
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
        # Nobody looks at shapes while rows differ, nor in a sharded model, where they are those of parts.
        if adapters.by_row is None and not sharded(owner):
            fill_shapes(graph, owner)
        if adapters.mode is not None:
            set_mode(graph, adapters.mode)
        _inject(owner, {"__call__": _call}, AdaptedGraph)
        owner.graph = graph
        return
    if adapters is None or not adapters.running():
        return
    forms = {site.form for site, _, _ in adapters.running()}
    # A `forward` on the instance hides the class's: `lower` has to see it, and refuse.
    plain = type(owner) is nn.Linear and not has_instance_forward(owner) and forms == {"branch"}
    key = _signature(owner, adapters) if plain else None
    if key is not None and key in _lowered:
        become(owner, _lowered[key])
        return
    members: dict[str, Any] = {"forward": type(owner).forward, "graph": None}
    if "branch" in forms:
        graph = lower(owner, adapters)
        kept = packed(owner)
        if kept:
            owner.__dict__[KEPT] = (
                None  # FX asks for all that a graph reads, and the class that has it is yet to be made
            )
        code = fx.GraphModule(owner, graph, type(owner).__name__)
        members = {"forward": type(code).forward, "graph": graph, "code": code.code}
        if kept:
            del owner.__dict__[KEPT]
            members[KEPT] = property(Kept)
    if "weight" in forms:
        members |= weight_form(adapters, members["forward"])
    _inject(owner, members)
    if key is not None:
        _lowered[key] = type(owner)


_lowered: dict[Hashable, type[nn.Module]] = {}
"""Classes made for `nn.Linear` owners. Their code refers to `self` alone, so equal layers share one class."""
_BOOKKEEPING = frozenset(nn.Module().__dict__)


def _signature(owner: nn.Module, adapters: Adapters) -> Hashable:
    """Everything that the lowered code of an `nn.Linear` depends on: its bias, dtype and the make-up of its branches."""
    branches = tuple((path, site.rows, _make_up(branch)) for site, branch, path in adapters.running())
    held = tuple((n, p.dtype) for n, p in owner.named_parameters(recurse=False))
    return held, branches, adapters.by_row is None


def _make_up(module: nn.Module) -> Hashable:
    own = {k: repr(v) for k, v in module.__dict__.items() if k not in _BOOKKEEPING}
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    held = tuple((n, isinstance(t, nn.Parameter), tuple(t.shape), t.dtype) for n, t in tensors)
    return type(module), tuple(sorted(own.items())), held, tuple((n, _make_up(m)) for n, m in module.named_children())


def _inject(owner: nn.Module, members: Mapping[str, Any], mixin: type = Adapted) -> None:
    base = type(owner)
    about = f"{base.__name__} with adapters."
    names = {"base_class": base, "dtypes": _dtypes(owner), "__module__": __name__, "__doc__": about}
    become(owner, type(f"Adapted{base.__name__.removesuffix('Impl')}", (mixin, base), {**names, **members}))


def lower(owner: nn.Module, adapters: Adapters) -> fx.Graph:
    """The owner's base graph with every active branch put wherever the owner uses its weight."""
    base = adapters.base_graph if adapters.base_graph is not None else trace(owner, keep=True)
    graph = fx.Graph() if base is None else strip_checks(copy.deepcopy(base))
    uses = Uses(owner, graph)
    served: set[tuple[nn.Module, nn.Parameter]] = set()  # places of a tied weight may share the owner
    for site, branch, path in adapters.running():
        parameter = adapted_parameter(owner, site)
        if (branch, parameter) in served or (site.form == "weight" and adapters.base_graph is None):
            continue
        served.add((branch, parameter))
        if not adapt(graph, uses, site, branch, path, parameter, rows=adapters.by_row is not None):
            raise AdapterError(
                f"The code of {site.owner or type(owner).__name__} has no use of {site.weight}, so its adapter would be "
                f"ignored. Usually the file was made for another version of the model, or `forward` was replaced on the "
                f"instance. Apply the rules anew, or take the replacement off first."
            )
    graph.lint()
    if (target := unwritable(graph)) is not None:
        raise AdapterError(
            f"The graph of a {type(owner).__name__} uses {target[:80]!r}, which no code can name. Usually a module has quotes, a "
            f"backslash or a keyword of Python in its name. Rename it, or choose other sites."
        )
    return graph


def adapt(
    graph: fx.Graph,
    uses: Uses,
    site: Site,
    branch: nn.Module,
    path: str,
    parameter: nn.Parameter,
    rows: bool = False,
) -> bool:
    """Put one branch at every use of its weight, with `rows` for those of a batch that are its own; whether there was any."""
    splice = Splice(graph, uses.sums, site, branch, path, rows)
    before = getattr(branch, "before", None)
    if before is not None:
        for affine in uses.of(parameter)[0]:
            splice.before(affine.node, affine.input, before)
        uses.forget(parameter)
    products, picks, reads = uses.of(parameter)
    relative = getattr(branch, "needs_base_weight", False)
    if site.form == "weight" or (relative and (picks or not branch.has_side_path)):
        for node in reads:
            splice.onto(node)
        return bool(reads)
    dtype = parameter.dtype if parameter.is_floating_point() else None
    for affine in products:
        splice.beside(affine.node, affine.input, dtype, weight_node(affine.node, affine.weight))
    for pick in picks:
        splice.lookup(pick)
    return bool(products or picks)
