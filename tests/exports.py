"""What the export tests share: tiny models with random adapters, and the smallest export."""

from __future__ import annotations

import tempfile
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
from graphpeft import onnx
from graphpeft.flat import Flat
from graphpeft.passes.export import export

SAMPLE = {"x": torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(7))}
CLOSE = 2e-6
"""fp32 sums of 64 to 256 terms in another order: measured up to 7e-7 on these models."""
FAR = 1e-2
"""Random adapters move these models' outputs by 0.1 and more."""


@cache
def deployed() -> SimpleNamespace:
    """A folder with slots at wq and wv and adapters `a` and `b`, its model and report, PyTorch's answers by adapter."""
    model = tiny("hand")
    want: dict[str | None, np.ndarray] = {None: model(SAMPLE["x"]).detach().numpy()}
    for seed, name in enumerate("ab"):
        gp.apply(model, "qv:lora(r=2)", name=name, inputs=SAMPLE)
        randomize(model, name, seed=seed)
        want[name] = model(SAMPLE["x"]).detach().numpy()
    home = tempfile.TemporaryDirectory()  # deleted when the tests are over
    folder = Path(home.name) / "deploy"
    report = export(model, folder, inputs=SAMPLE)
    return SimpleNamespace(home=home, model=model, folder=folder, report=report, want=want)


def tiny(name: str) -> nn.Module:
    """A model of one layer; the same weights every time."""
    torch.manual_seed(0)
    one = {"llama": lambda: zoo.llama(layers=1), "gpt2": lambda: zoo.gpt2(n_layer=1), "hand": zoo.HandWritten}
    if name in one:
        return one[name]().eval()
    model = zoo._classifier("Bert", num_hidden_layers=1, **zoo.BERT)("sdpa").eval()
    nn.init.normal_(model.classifier.weight, std=1.0)  # fresh ones scale every output, and every effect, down
    return model


def adapted(name: str, *rules: str, **options: Any) -> nn.Module:
    """A tiny model with adapters "a", "b", ... of random numbers; the last one is active."""
    model = tiny(name)
    for seed, (label, rule) in enumerate(zip("abc", rules, strict=False)):
        gp.apply(model, rule, name=label, **options)
        randomize(model, label, seed=seed)
    return model


def hand(*rules: str) -> nn.Module:
    """The smallest model with adapters."""
    return adapted("hand", *(rules or ("qv:lora(r=2)",)), inputs=SAMPLE)


def ids(batch: int, length: int, padded: bool = False) -> dict[str, torch.Tensor]:
    """Random tokens, the last two of row 0 padded on demand."""
    generator = torch.Generator().manual_seed(batch)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length - 2 :] = 0 if padded else 1
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
        return onnx.translate(flat.module(), flat.inputs, flat.outputs, [flat.axes[name] for name in flat.inputs], None)


def silent() -> ort.SessionOptions:
    """Session options without ONNX Runtime's warning about every slot."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return options
