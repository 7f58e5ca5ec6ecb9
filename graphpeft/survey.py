"""Every site of a model, whatever it takes to see them: capture, normalize, find, and the same for unreached parts.

A call with text alone does not run the vision tower of a vision-language model. Such a part is a model of its own,
with a config that sample inputs can be made from, so it is captured by itself and its sites are named from the root.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import fx, nn

from graphpeft.ambient import plain
from graphpeft.capture.capture import Inputs, capture
from graphpeft.capture.samples import sample_calls
from graphpeft.errors import CaptureError
from graphpeft.match.find import Found, find
from graphpeft.passes.normalize import normalize
from graphpeft.program import Program, Site
from graphpeft.quantized import in_floats


@plain()
def survey(model: nn.Module, inputs: Inputs = None) -> Found:
    """Sites of the model as `inputs` runs it; without inputs, as example calls made from the configs run all its parts.

    Of quantized weights, the shapes are seen that they stand for. Raises `CaptureError` when nothing can be captured; a part
    that cannot is noted in `Found.unreached`.
    """
    with in_floats(model):
        return _survey(model, inputs)


def _survey(model: nn.Module, inputs: Inputs) -> Found:
    if inputs is not None or isinstance(model, fx.GraphModule) or not hasattr(model, "config"):
        return find(normalize(capture(model, inputs)))
    program, error = _attempt(model)
    found = find(program) if program is not None else Found((), {})
    sites, reached, unreached = list(found.sites), set(found.reached), {}
    programs = dict(found.programs)
    for path, part in _parts(model, found.reached):
        inside, failure = _attempt(part)
        if inside is None:
            unreached[path] = str(failure)
        else:
            seen = find(inside)
            programs[path] = inside
            sites += _named_from_root(seen.sites, path)
            reached |= {f"{path}.{name}" for name in seen.reached}
    if error is not None:
        if not sites:
            raise error
        unreached = {"": str(error), **unreached}
    return Found(tuple(sites), found.misses, frozenset(reached), unreached, programs)


def _attempt(model: nn.Module) -> tuple[Program | None, CaptureError | None]:
    """The program of the first example call that can be captured, or the error of the first."""
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


def _parts(model: nn.Module, reached: frozenset[str]) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that are models of their own and of which nothing was reached."""
    taken: list[str] = []
    for path, module in model.named_modules():
        if not path or getattr(module, "main_input_name", None) is None or any(path.startswith(t) for t in taken):
            continue
        names = [f"{path}.{name}" for name, _ in module.named_parameters()]
        if names and not reached & set(names):
            taken.append(f"{path}.")
            yield path, module


def _named_from_root(sites: tuple[Site, ...], path: str) -> Iterator[Site]:
    """A part's sites under their names in the whole model; what ends a part is not the model's head."""
    for site in sites:
        role = "other" if site.role == "head" else site.role
        weight, owner = f"{path}.{site.weight}", f"{path}.{site.owner}".removesuffix(".")
        yield replace(site, role=role, weight=weight, owner=owner, tied=tuple(_named_from_root(site.tied, path)))
