"""The work of the commands `graphpeft export` and `graphpeft run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graphpeft.capturing.skeleton import pretrained
from graphpeft.errors import AdapterError, FileError
from graphpeft.passes.activate import activate
from graphpeft.passes.export import export
from graphpeft.passes.load import load
from graphpeft.rewrite.state import get_state
from graphpeft.runtime.folder import ExportReport
from graphpeft.runtime.session import Session


def ship(model: str, adapters: Sequence[Path], out: Path, **options: Any) -> ExportReport:
    """Load a model and its adapters, and export them, with the model's tokenizer if it has one."""
    built = pretrained(model)
    for folder in adapters:
        load(built, folder)
    if options.get("merged"):
        activate(built, list(get_state(built).adapters))
    return export(built, out, tokenizer=_tokenizer(Path(model), required=False), **options)


def answer(folder: Path, text: str, adapters: Sequence[str], tokens: int, **options: Any) -> str:
    """A decoder's generated text, without the prompt; for other models every output's shape and first values."""
    session = Session(folder)
    mix = dict(map(_strength, adapters))
    session.use(next(iter(mix)) if list(mix.values()) == [1.0] else mix or None)  # compact exports do not blend
    tokenizer = _tokenizer(folder)
    inputs = {name: value for name, value in tokenizer(text, return_tensors="np").items() if name in _taken(session)}
    if not inputs.get("input_ids", np.zeros(1)).size:
        raise AdapterError(f"{text!r} has no tokens. Give a non-empty text.")
    if any(name.startswith("past_key_values.") for graph in session.graphs.values() for name in graph.inputs):
        found = session.generate(inputs, tokens, **options)
        prompt = inputs["input_ids"].shape[1] if len(session.graphs) == 1 else 1
        return str(tokenizer.decode(found[0, prompt:], skip_special_tokens=True))
    outputs = session.run(inputs)
    return "\n".join(
        f"{name} {list(value.shape)}: {value.ravel()[:8].round(4).tolist()}" for name, value in outputs.items()
    )


def _taken(session: Session) -> set[str]:
    return {name for graph in session.graphs.values() for name in graph.inputs}


def _strength(given: str) -> tuple[str, float]:
    name, _, strength = given.partition("=")
    try:
        return name, float(strength or 1)
    except ValueError:
        raise AdapterError(f"--adapter {given}: {strength!r} is not a number. Write NAME, or NAME=0.5.") from None


def _tokenizer(folder: Path, required: bool = True) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        if not required:
            return None
        raise FileError(
            f"{folder}: there is no tokenizer. Export with tokenizer=, or copy tokenizer.json and tokenizer_config.json there."
        ) from error
