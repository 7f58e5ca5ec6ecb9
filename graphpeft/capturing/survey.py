"""Find every site of a model: capture it, capture the parts that its example calls do not run, and search them all.

A call with text alone does not run the vision tower of a vision-language model. Such a part is itself a model, with a
config for sample inputs, so it is captured separately, and its sites are named from the root.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import fx, nn

from graphpeft.ambient import plain
from graphpeft.capturing.base_view import base_view
from graphpeft.capturing.capture import Inputs, capture
from graphpeft.capturing.normalize import normalize
from graphpeft.capturing.samples import sample_calls
from graphpeft.errors import CaptureError
from graphpeft.ir.program import Program
from graphpeft.ir.site import Site
from graphpeft.match.find import SearchResult, find


@dataclass(frozen=True)
class Captured:
    """Programs by module path: the root's, and those of parts that the root's example call does not run."""

    programs: Mapping[str, Program]
    unreached: Mapping[str, str]
    """Parts that could not be captured either, and why."""
    error: CaptureError | None = None
    """Why the root could not be captured."""


@plain()
def find_base_sites(model: nn.Module, inputs: Inputs = None) -> SearchResult:
    """Every site of a model's base. Without inputs, example calls made from the configs run all its parts.

    Raises `CaptureError` when nothing can be captured; `SearchResult.unreached` lists parts that could not be captured.
    """
    with base_view(model):
        return find_sites(capture_programs(model, inputs))


def capture_programs(model: nn.Module, inputs: Inputs = None) -> Captured:
    """Capture and normalize a model and the parts that no example call runs. Call it within `base_view`."""
    if inputs is not None or isinstance(model, fx.GraphModule) or not hasattr(model, "config"):
        return Captured({"": normalize(capture(model, inputs))}, {})
    program, error = _attempt(model)
    programs = {"": program} if program is not None else {}
    unreached = {"": str(error)} if error is not None else {}
    for path, part in _parts(model, _used(program) if program is not None else set()):
        inside, failure = _attempt(part)
        if inside is None:
            unreached[path] = str(failure)
        else:
            programs[path] = inside
    return Captured(programs, unreached, error)


def find_sites(captured: Captured) -> SearchResult:
    """The sites of all programs, named from the root. If there are none, raises the error of the root's capture."""
    found = {path: find(program) for path, program in captured.programs.items()}
    root = found.get("", SearchResult((), {}))
    sites, reached = list(root.sites), set(root.reached)
    for path, inside in found.items():
        if path:
            sites += _named_from_root(inside.sites, path)
            reached |= {f"{path}.{name}" for name in inside.reached}
    if captured.error is not None and not sites:
        raise captured.error
    return SearchResult(tuple(sites), root.misses, frozenset(reached), captured.unreached, captured.programs)


def _attempt(model: nn.Module) -> tuple[Program | None, CaptureError | None]:
    """The program of the first example call that can be captured, or else the error of the first call."""
    first: CaptureError | None = None
    try:
        for call in sample_calls(model):
            try:
                return normalize(capture(model, call)), None
            except CaptureError as error:
                first = first or error
    except CaptureError as error:  # no example call is known
        first = first or error
    return None, first


def _used(program: Program) -> set[str]:
    """The weights that the graph uses: `normalize` erased every node that no output depends on."""
    return {name for node, name in program.weights.items() if node.users}


def _parts(model: nn.Module, reached: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that are themselves models and have no reached weight."""
    taken: list[str] = []
    for path, module in model.named_modules():
        if not path or getattr(module, "main_input_name", None) is None or any(path.startswith(t) for t in taken):
            continue
        names = [f"{path}.{name}" for name, _ in module.named_parameters()]
        if names and not reached & set(names):
            taken.append(f"{path}.")
            yield path, module


def _named_from_root(sites: tuple[Site, ...], path: str) -> Iterator[Site]:
    """A part's sites under their names in the whole model; the last projection of a part is not the model's head."""
    for site in sites:
        role = "other" if site.role == "head" else site.role
        weight, owner = f"{path}.{site.weight}", f"{path}.{site.owner}".removesuffix(".")
        yield replace(site, role=role, weight=weight, owner=owner, tied=tuple(_named_from_root(site.tied, path)))
