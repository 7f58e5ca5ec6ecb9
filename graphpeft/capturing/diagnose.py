"""Explain why a capture failed: the module, the line of the model's code, the cause in plain words and the remedy.

torch raises deep in its own code, and often wraps the error of the model in others. So `explain` walks the traceback of
the error and of its causes to the innermost frame that belongs to the model's code, finds the module by the `self` of
that frame, and looks for the words of `CAUSES` in all the messages; the first cause that fits wins.
"""

from __future__ import annotations

import inspect
import linecache
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

import torch
from torch import nn

_TORCH, _OWN, _STDLIB = Path(torch.__file__).parent, Path(__file__).parents[1], Path(sysconfig.get_path("stdlib"))
_WIDTH = 110
"""Quoted text is cut after this many columns."""


class Cause(NamedTuple):
    """A possible cause, and a pattern for the words in which torch or Python reports it."""

    words: str
    cause: str
    remedy: str


FITTING = "{inputs}"
"""A placeholder for the advice on inputs, which depends on who made them."""
DATA = Cause(
    r"data-dependent|DataDependent|DynamicOutputShape|_local_scalar_dense",
    "the code branches on the values of a tensor, or makes a size of them; a graph holds one path for all values",
    "Compute both ways and choose with torch.where, or make the choice a setting of the model.",
)
ABSENT = Cause(
    r"not compiled with|not linked with|CUDA GPUs|NVIDIA driver|device ordinal|Cannot access accelerator",
    "it asks for a device that this machine does not have",
    "Move the model with model.to('cpu'), and see that neither its config nor its code names another device.",
)
MEETING = Cause(
    r"same device|Device Propagation|different devices|from a meta tensor",
    "tensors on different devices meet",
    "Give inputs on the model's device, and let the code make tensors on the device of an input.",
)
CAUSES = (
    DATA,
    ABSENT,
    MEETING,
    Cause(
        r"required (positional |keyword-only )?argument|unexpected keyword argument|positional arguments?\b|multiple values for",
        "the call does not fit the arguments of forward",
        FITTING,
    ),
    Cause(
        r"scalar type|same dtype|to have one of the following|expected .* dtype|dtype .* (but|and) ",
        "tensors of different dtypes meet",
        FITTING,
    ),
    Cause(
        r"shape|size of tensor|must match|is invalid for input|size mismatch|sizes? .*expected"
        r"|[Ee]xpected .*(input|dim|size|chann)|broadcast|reduction dim|out of (range|bounds)",
        "the inputs do not fit: shapes mismatch",
        FITTING,
    ),
    Cause(
        r"missing the required \"forward\"",
        "it has no forward",
        "Capture the module that is called, or give the class a forward.",
    ),
    Cause(
        r"pytree|[Uu]nsupported input type|Expecting .* to be|is not supported as (an )?(input|output)|supported types",
        "it takes or returns objects that are neither tensors nor containers of them",
        "Give and return tensors in tuples, lists and dicts, or register the class with torch.export.register_dataclass.",
    ),
    Cause(
        r"NotImplemented|UnsupportedOperator|Could not run|fake impl|meta kernel|data pointer|data_ptr|numpy|tracing",
        "an operator is not supported without real values",
        "Turn custom kernels off in the model's settings, or describe the operator to torch with torch.library.register_fake.",
    ),
)


def explain(model: nn.Module, error: Exception, guessed: bool) -> str:
    """Why `model` cannot be captured, in five lines at most; `guessed`: the inputs were made from its config."""
    passed = [_frames(e) for e in _chain(error)]
    frames = next((f for f in passed if any(_is_model_code(frame.f_code) for frame, _ in f)), passed[0])
    path, module = _innermost(model, frames)
    known = _cause(error, bool(frames) and _is_model_code(frames[-1][0].f_code))
    place = f"in {path} ({type(module).__name__})" if path else f"in {type(module).__name__}"
    source = _source(model, module, frames)
    lines = [
        f"{type(model).__name__} cannot be captured: {known.cause}.",
        f"  {place}{f', {source[0]}' if source else ''}",
    ]
    if source and source[1]:
        lines.append(f"    {_cut(source[1])}")
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if known is not DATA and reason and not re.search(r"\.py\b", reason):
        lines.append(f"  {type(error).__name__}: {_cut(reason)}")
    return "\n".join([*lines, _fitting(model, guessed) if known.remedy == FITTING else known.remedy])


def _cause(error: Exception, raised_by_model: bool) -> Cause:
    text = " ".join(f"{type(e).__name__}: {e}" for e in _chain(error))
    known = next((c for c in CAUSES if re.search(c.words, text)), None)
    if known is None or (raised_by_model and known is not DATA):
        return Cause("", f"its own code raised {type(error).__name__}", FITTING)
    if known is MEETING and set(re.findall(r"\b(cuda|xpu|mps|hpu|npu)\b", text)) - _present():
        return ABSENT
    return known


def _present() -> set[str]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {accelerator.type} if accelerator else set()


def _fitting(model: nn.Module, guessed: bool) -> str:
    if guessed:
        return "The inputs were made from the config; pass inputs={...} with a call that works."
    takes = ", ".join(list(inspect.signature(model.forward).parameters)[:6])
    return f"Check that model(**inputs) runs, with a batch and lengths of at least 2; forward takes ({_cut(takes)})."


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    step: BaseException | None = error
    while step is not None and id(step) not in seen:
        seen.add(id(step))
        yield step
        step = step.__cause__ or step.__context__


def _frames(error: BaseException) -> list[tuple[FrameType, int]]:
    """Frames that the error passed through, outermost first, with their line numbers."""
    found, trace = [], error.__traceback__
    while trace is not None:
        found.append((trace.tb_frame, trace.tb_lineno))
        trace = trace.tb_next
    return found


def _is_model_code(code: CodeType) -> bool:
    """Whether the code belongs to none of torch, Python and graphpeft."""
    file = Path(code.co_filename)
    if not file.is_file() or file.is_relative_to(_TORCH) or file.is_relative_to(_OWN):
        return False
    return not file.is_relative_to(_STDLIB) or "site-packages" in file.parts


def _innermost(model: nn.Module, frames: list[tuple[FrameType, int]]) -> tuple[str, nn.Module]:
    """Path and module of the innermost module method that the error passed through.

    While tracing, torch may call a stand-in that shares the module's attributes, so the attributes identify the module.
    """
    paths = {id(m.__dict__): (path, m) for path, m in model.named_modules()}
    for frame, _ in reversed(frames):
        found = frame.f_locals.get("self")
        if isinstance(found, nn.Module) and id(found.__dict__) in paths:
            return paths[id(found.__dict__)]
    return "", model


def _source(model: nn.Module, module: nn.Module, frames: list[tuple[FrameType, int]]) -> tuple[str, str] | None:
    """`file.py:line` and that line: the innermost frame in a file of the model, or else the start of the forward."""
    own = [(frame.f_code.co_filename, line) for frame, line in frames if _is_model_code(frame.f_code)]
    files = {code.co_filename for m in model.modules() if (code := _forward(m))}
    passed = [place for place in own if place[0] in files] or own
    begins = _forward(module)
    if not passed and begins and _is_model_code(begins):
        passed = [(begins.co_filename, begins.co_firstlineno)]
    if not passed:
        return None
    file, line = passed[-1]
    return f"{Path(file).name}:{line}", linecache.getline(file, line).strip()


def _forward(module: nn.Module) -> CodeType | None:
    return getattr(inspect.unwrap(type(module).forward), "__code__", None)


def _cut(text: str) -> str:
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1].rstrip() + "…"
