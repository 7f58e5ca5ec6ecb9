"""Where an owner keeps its adapters: one container on the module, with a branch for each site."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import fx, nn

from graphpeft.errors import AdapterError
from graphpeft.ir.site import Site
from graphpeft.ir.weights import get_parameter
from graphpeft.names import attribute
from graphpeft.rewrite.rows import Rows

HOME = "adapters"
"""Attribute of an owner under which its adapters live."""


REMEMBERED = 8
"""How many classes an owner keeps for adapters that are not active now."""


Held = tuple[nn.Module, list[tuple[dict[str, Any], str]]]
"""A branch, and for each of its parameters the dictionary of its module and its name there."""


@dataclass(frozen=True)
class Installed:
    """A class that was made for an owner, and for a graph module its graph."""

    wanted: tuple[Any, ...]
    """What it was made for: see `owner.install`."""
    kind: type[nn.Module]
    graph: fx.Graph | None
    change: int
    """How many changes the container had seen then."""


class Adapters(nn.Module):
    """What an owner knows of its adapters: per adapter a `ModuleDict` of branches, and which adapters are active."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, dict[str, Site]] = {}
        self.active: tuple[str, ...] = ()
        self.base_graph: fx.Graph | None = None
        """The base graph of a `GraphModule` owner; other owners are traced anew from their own class."""
        self.mode: bool | None = None
        """For such an owner, the mode that `train()` or `eval()` asked for; `None` as long as neither was called."""
        self.refusals: dict[str, Any] = {}
        """The `train` and `eval` that torch.export put on the instance, which raise."""
        self.changes = 0
        """How often branches came or went, or tensors may have changed their dtype."""
        self.held: dict[str, tuple[int, list[Held]]] = {}
        self.detached = False
        """Whether the owner was restored and its adapters taken off the module tree, to be put back later."""
        self.opaque = False
        """Whether nobody saw how the model uses the owner, so that its code runs as it is and reads adapted weights."""
        self.installed: dict[tuple[tuple[str, ...], bool, bool | None], Installed] = {}
        """Classes made for the owner, by the adapters that are active in them, whether rows differ, and the mode."""
        self.guests: set[str] = set()
        """Branches that another owner's tied weight brought along: a state dict holds them there alone."""
        self.by_row: Rows | None = None
        """While every row of a batch has adapters of its own, what says which rows."""
        self.register_state_dict_post_hook(_leave_out_guests)
        self.register_load_state_dict_pre_hook(_let_guests_be)

    def add(self, name: str, site: Site, branch: nn.Module, guest: bool = False) -> None:
        self.changes += 1
        if name not in self._modules:
            self.add_module(name, nn.ModuleDict())
            self.sites[name] = {}
        key = slot(site)
        if self.sites[name].get(key, site) != site:
            raise AdapterError(
                f"{site.weight} ({site.role}) and {self.sites[name][key].weight} ({self.sites[name][key].role}) would share one "
                f"place among the adapters of {site.owner or 'the model'}. Rename one of the two modules, or choose other sites."
            )
        cast(nn.ModuleDict, self._modules[name])[key] = branch
        self.sites[name][key] = site
        if guest:
            self.guests.add(f"{name}.{key}.")

    def __getstate__(self) -> dict[str, Any]:
        """Classes made here can be neither pickled nor shared: a copy makes its own."""
        return {**super().__getstate__(), "installed": {}, "held": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapters:
        """A copy of the owner shares its class, so what the class was made for comes along, as modules of the copy."""
        clone = memo[id(self)] = type(self).__new__(type(self))
        clone.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        kept = {state: made for state, made in self.installed.items() if made.graph is None}
        clone.__dict__["installed"] = {
            state: replace(made, wanted=copy.deepcopy(made.wanted, memo)) for state, made in kept.items()
        }
        return clone

    def remember(self, state: tuple[tuple[str, ...], bool, bool | None], made: Installed) -> None:
        """Keep a class that was made, and only the last few: who goes through many sets of adapters makes many."""
        self.installed.pop(state, None)
        self.installed[state] = made
        while len(self.installed) > REMEMBERED:
            del self.installed[next(iter(self.installed))]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.changes += 1
        return super()._apply(*args, **kwargs)

    def drop(self, name: str) -> None:
        self.changes += 1
        del self._modules[name], self.sites[name]
        self.guests = {path for path in self.guests if not path.startswith(f"{name}.")}
        self.active = tuple(a for a in self.active if a != name)

    def rename(self, old: str, new: str) -> None:
        """Keep the order, in which active adapters act."""
        self.changes += 1
        self._modules = {new if name == old else name: module for name, module in self._modules.items()}
        self.sites = {new if name == old else name: sites for name, sites in self.sites.items()}
        self.active = tuple(new if name == old else name for name in self.active)
        prefix = f"{old}."
        self.guests = {new + path[len(old) :] if path.startswith(prefix) else path for path in self.guests}

    def take(self, name: str, site: Site) -> None:
        """Remove the branch of one site, and the adapter with its last one."""
        key = slot(site)
        del cast(nn.ModuleDict, self._modules[name])[key], self.sites[name][key]
        self.guests.discard(f"{name}.{key}.")
        if not self.sites[name]:
            self.drop(name)

    def branches(self, name: str) -> Iterator[tuple[Site, nn.Module, str]]:
        """(site, branch, path of the branch below the owner) of one adapter."""
        modules = cast(nn.ModuleDict, self._modules[name])
        for key, site in self.sites[name].items():
            yield site, modules[key], f"{HOME}.{name}.{key}"

    def _branches(self, name: str) -> dict[str, nn.Module]:
        return cast(nn.ModuleDict, self._modules[name])._modules

    def branch(self, name: str, key: str) -> nn.Module:
        return cast(nn.ModuleDict, self._modules[name])[key]

    def trained(self, name: str, anew: bool = True) -> list[Held]:
        """The branches of an adapter, each with where its parameters are held: tools put others there. As found before, unless
        `anew` or something has changed."""
        change, found = self.held.get(name, (-1, []))
        if anew or change != self.changes:
            found = [
                (branch, [(part._parameters, leaf) for part in _inside(branch) for leaf in part._parameters])
                for branch in self._branches(name).values()
            ]
            self.held[name] = self.changes, found
        return found

    def fits(self, owner: nn.Module) -> bool:
        """Whether the owner has the weights that the adapters were made for."""
        for site in (site for sites in self.sites.values() for site in sites.values()):
            try:
                weight = adapted_parameter(owner, site)
            except AdapterError:
                return False
            if weight.is_floating_point() and weight.numel() != (site.full or site.outputs) * site.inputs * (
                site.stack or 1
            ):
                return False
        return True

    def running(self) -> list[tuple[Site, nn.Module, str]]:
        return [b for name in self.active for b in self.branches(name)]

    def running_modules(self) -> Iterator[nn.Module]:
        """Every module of the active branches."""
        for name in self.active:
            yield from _inside(self._modules[name])


def _inside(module: nn.Module | None) -> list[nn.Module]:
    """The module and all below it. Written out, because switching adapters goes through all of them."""
    found, waiting = [], [module]
    while waiting:
        part = waiting.pop()
        if part is not None:
            found.append(part)
            waiting.extend(part._modules.values())
    return found


# A state dict with two names for one tensor would not pass safetensors, which transformers saves models with.


def _leave_out_guests(adapters: Adapters, state: dict[str, Any], prefix: str, _: Any) -> None:
    for path in adapters.guests:
        for key in [key for key in state if key.startswith(prefix + path)]:
            del state[key]


def _let_guests_be(adapters: Adapters, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for path in adapters.guests:
        for key, tensor in adapters.get_submodule(path[:-1]).state_dict().items():
            state.setdefault(prefix + path + key, tensor)


def slot(site: Site) -> str:
    """Name of a site's branch inside its owner: the role, after the weight's path where one owner has several."""
    local = site.weight[len(site.owner) + 1 if site.owner else 0 :]
    name = site.role if local == "weight" else f"{local.removesuffix('.weight')}_{site.role}"
    name = attribute(name.replace(".", "_"))
    return f"{name}_" if hasattr(_EMPTY, name) else name


_EMPTY = nn.ModuleDict()
"""What holds the branches, and has attributes of its own."""


def places(site: Site) -> tuple[Site, ...]:
    """Every place where the site's adapter acts: its own, and those that hold the same tied weight."""
    return (site, *site.tied)


def adapted_parameter(owner: nn.Module, site: Site) -> nn.Parameter:
    """The base weight of a site, found below its owner."""
    local = site.weight[len(site.owner) + 1 if site.owner else 0 :]
    return get_parameter(owner, local)


def home(owner: nn.Module) -> Adapters | None:
    """The owner's adapters, or `None` for a module that has none."""
    found = owner._modules.get(HOME)
    return found if isinstance(found, Adapters) else None


def container(owner: nn.Module, path: str) -> Adapters:
    """The owner's adapters, or an empty container for them that is not yet in the module tree."""
    existing = home(owner)
    if existing is not None:
        return existing
    if hasattr(owner, HOME):
        raise AdapterError(
            f"{path or type(owner).__name__} already has an attribute {HOME!r}, where graphpeft keeps its adapters. "
            f"Rename that attribute, or choose other sites."
        )
    return Adapters()


def hold(owner: nn.Module, adapters: Adapters) -> None:
    """Put a container into the module tree, if it is not there yet."""
    if home(owner) is adapters:
        return
    if isinstance(owner, fx.GraphModule):
        adapters.base_graph = owner.graph
        adapters.refusals = {n: owner.__dict__[n] for n in ("train", "eval") if n in owner.__dict__}
    owner.add_module(HOME, adapters)
    for name in adapters.refusals:
        owner.__dict__.pop(name, None)


def settle(owner: nn.Module, path: str) -> Adapters:
    """The owner's adapters, made empty on first use."""
    adapters = container(owner, path)
    hold(owner, adapters)
    return adapters
