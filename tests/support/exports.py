"""What the export tests share: tiny models with random adapters, and the smallest export."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
import zoo
from checks import Snapshot, randomize, same
from torch import nn

import graphpeft as gp
from graphpeft.exporting import onnx
from graphpeft.exporting.flat import Flat
from graphpeft.passes.export import export
from graphpeft.rewrite.state import get_state
from graphpeft.runtime.session import Session

SAMPLE = {"x": torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(7))}
CLOSE = 2e-6
"""fp32 sums of 64 to 256 terms in another order: measured up to 7e-7 on these models."""
FAR = 1e-2
"""Random adapters move these models' outputs by 0.1 and more."""


HAND = ["qv:lora(r=2); path(out):lora(r=3)"] * 2
"""Rules of the adapters a and b of `deployed()`."""


@cache
def deployed() -> SimpleNamespace:
    """A folder with a slot for wq and wv, which read one activation, and one for out; adapters `a` and `b`, PyTorch's answers."""
    model = adapted("hand", *HAND, inputs=SAMPLE)
    want = {name: running(model, name, SAMPLE) for name in (None, "a", "b")}
    home = tempfile.TemporaryDirectory()  # deleted when the tests are over
    folder = Path(home.name) / "deploy"
    report = export(model, folder, inputs=SAMPLE, share=True)
    return SimpleNamespace(home=home, model=model, folder=folder, report=report, want=want)


def tiny(name: str) -> nn.Module:
    """A model of one layer; the same weights every time."""
    torch.manual_seed(0)
    one = {
        "llama": lambda: zoo.llama(layers=1),
        "gpt2": lambda: zoo.gpt2(n_layer=1),
        "qwen3": lambda: zoo._decoder("Qwen3", num_hidden_layers=1, num_key_value_heads=2, head_dim=16)("sdpa"),
        "t5": lambda: zoo.t5(num_layers=1),
        "whisper": zoo.whisper,
        "hand": zoo.HandWritten,
    }
    if name in one:
        return one[name]().eval()
    model = zoo._classifier("Bert", num_hidden_layers=1, **zoo.BERT)("sdpa").eval()
    nn.init.normal_(model.classifier.weight, std=1.0)  # fresh ones scale every output, and every effect, down
    return model


def adapted(name: str, *rules: str, **options: Any) -> nn.Module:
    """A tiny model with adapters "a", "b", ... of random numbers; the last one is active."""
    return adapt(tiny(name), rules, **options)


def adapt(model: nn.Module, rules: Sequence[str], **options: Any) -> nn.Module:
    """The model with an adapter for each of the rules."""
    for seed, (label, rule) in enumerate(zip("abc", rules, strict=False)):
        gp.apply(model, rule, name=label, **options)
        randomize(model, label, seed=seed)
    return model


def hand(*rules: str) -> nn.Module:
    """The smallest model with adapters."""
    return adapted("hand", *(rules or ("qv:lora(r=2)",)), inputs=SAMPLE)


def ids(batch: int, length: int, left: int = 0, right: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens; row 0 is padded by so many on a side."""
    generator = torch.Generator().manual_seed(batch)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :left] = 0
    mask[0, length - right :] = 0
    return {"input_ids": torch.randint(3, zoo.VOCAB, (batch, length), generator=generator), "attention_mask": mask}


def off(got: np.ndarray, want: np.ndarray) -> float:
    """The largest absolute difference."""
    assert got.shape == want.shape
    return float(np.abs(got - want).max())


def unchanged(before: Snapshot, model: nn.Module) -> bool:
    """As it was, but for the classes of adapted modules, which are made anew."""
    after = Snapshot.of(model)
    kept = replace(before, tensors={}, modules={}) == replace(after, tensors={}, modules={})
    return kept and same(before.tensors.values(), after.tensors.values())


def translated(model: nn.Module, inputs: Any = None) -> ir.Model:
    """The base model's graph by the same translation."""
    flat = Flat.of(model, inputs)
    with torch.no_grad():
        return onnx.translate(flat.module(), flat.inputs, flat.outputs, [flat.axes[name] for name in flat.inputs])


def silent() -> ort.SessionOptions:
    """Session options without ONNX Runtime's warning about every slot."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return options


RULES = {
    "llama": ("qkv:lora(r=4); mlp:lora(r=4)", "qv:lora(r=2); down:rlora(r=48)"),
    "gpt2": ("qkvo:lora(r=3)", "qv:lora(r=2); mlp:lora"),
    "qwen3": ("qkvo:lora(r=3)", "mlp:lora(r=4)"),
    "t5": ("qkvo:lora(r=3)", "qv:lora(r=2)"),
    "whisper": ("qv:lora(r=3)", "mlp:lora(r=4)"),
}
"""Of the adapters a and b."""


@cache
def serving(name: str) -> SimpleNamespace:
    """A folder of a model that generates, with adapters a and b, and its model. GPT-2's has gates for rows."""
    model = tiny(name)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # fresh models repeat their last token, whatever they are told
            nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    adapt(model, RULES[name])
    home = tempfile.TemporaryDirectory()  # deleted when the tests are over
    folder = Path(home.name) / "deploy"
    report = export(model, folder, per_row=name == "gpt2", share=True, verify="off")
    return SimpleNamespace(home=home, model=model, folder=folder, report=report)


def running(model: nn.Module, use: str | list[str] | None, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """PyTorch's logits, or only output, under these adapters, at the positions that the mask gives."""
    given = dict(inputs)
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    before = get_state(model).active
    gp.activate(model, use)
    try:
        with torch.no_grad():
            found = model(**given)
    finally:
        gp.activate(model, before or None)
    return (found if isinstance(found, torch.Tensor) else found.logits).numpy()


def arrays(inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """What a session takes."""
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def dense(strengths: Mapping[str, float], x: torch.Tensor) -> np.ndarray:
    """PyTorch's output with every adapter's update, times its strength, added to the weights of `deployed()`'s base."""
    model, session = tiny("hand"), Session(deployed().folder)
    with torch.no_grad():
        for name, strength in strengths.items():
            for site, (a, b) in session.loaded(name)["model"].pairs.items():
                weight = model.out.weight if site == "out" else getattr(model, site)
                weight += strength * torch.from_numpy(a @ b).T
        return model(x).numpy()
