"""The steps of the demo. Each returns figures, writes files, and prints only its progress."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import graphpeft as gp
from graphpeft.demo.data import corpus
from graphpeft.demo.model import Batch, Classifier, batches, load, train_head
from graphpeft.demo.train import accuracy, fit, logits
from graphpeft.errors import VerifyError

Progress = Callable[[str, int], AbstractContextManager[Callable[[float], None]]]
"""(name, steps) -> a context that yields the function to call with the loss after each step."""


@dataclass(frozen=True)
class Size:
    """Sizes of the run: texts per area, epochs, batch size, and length in tokens."""

    train: int = 150
    test: int = 50
    epochs: int = 3
    batch: int = 32
    length: int = 64


QUICK = Size(train=16, test=10, epochs=1, batch=16, length=24)


@dataclass(frozen=True)
class Recipe:
    """One adapter and a learning rate that suits its method."""

    name: str
    rules: str
    lr: float


RECIPES = (Recipe("rlora", "qv:rlora", 5e-2), Recipe("lora", "qv:lora; mlp:lora", 2e-3))


@dataclass
class Task:
    """The state that the steps share: the model, its texts, and the results so far."""

    model: Classifier
    training: list[Batch]
    testing: list[Batch]
    results: dict[str, Any]

    @property
    def sample(self) -> dict[str, Tensor]:
        """An example call for captures: three texts, with a length other than three."""
        return {name: value[:3] for name, value in self.testing[-1].inputs.items()}


def prepare(size: Size, seed: int) -> Task:
    """Collect the texts, load the encoder, and fit the head, which is then frozen, so that all adapters share it."""
    texts = corpus(seed, size.train, size.test)
    torch.manual_seed(seed)
    model, tokenizer = load(len(texts.areas))
    training, testing = (
        batches(tokenizer, [text.words for text in part], texts.labels(part), size.batch, size.length)
        for part in (texts.train, texts.test)
    )
    train_head(model, training)
    results = {
        "seed": seed,
        "size": asdict(size),
        "areas": texts.areas,
        "texts": {"train": len(texts.train), "test": len(texts.test)},
        "accuracy": accuracy(logits(model, testing), testing),
        "adapters": {},
    }
    return Task(model, training, testing, results)


def adapt(task: Task, recipe: Recipe, size: Size, seed: int, folder: Path, progress: Progress) -> list[float]:
    """Add one adapter to the model, train it and save it; returns the losses. Earlier adapters become inactive."""
    gp.apply(task.model, recipe.rules, inputs=task.sample, name=recipe.name, seed=seed)
    trainable, total = gp.trainable(task.model)
    start = time.perf_counter()
    with progress(recipe.name, size.epochs * len(task.training)) as report:
        losses = fit(task.model, task.training, epochs=size.epochs, lr=recipe.lr, seed=seed, report=report)
    seconds = round(time.perf_counter() - start, 1)
    gp.save(task.model, folder, name=recipe.name)
    task.results["adapters"][recipe.name] = {
        **asdict(recipe),
        "trainable": trainable,
        "share": trainable / total,
        "accuracy": accuracy(logits(task.model, task.testing), task.testing),
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "seconds": seconds,
    }
    return losses


def fold(task: Task) -> dict[str, Any]:
    """Merge the active adapter and un-merge it. Raises `VerifyError` unless the weights are restored bit for bit."""
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    adapted = logits(task.model, task.testing)
    gp.merge(task.model)
    merged = logits(task.model, task.testing)
    gp.unmerge(task.model)
    after = task.model.state_dict()
    if before.keys() != after.keys() or not all(torch.equal(before[name], after[name]) for name in before):
        raise VerifyError("Un-merging left other weights than before the merge; please report this as a bug.")
    return {"adapter": RECIPES[-1].name, "difference": (merged - adapted).abs().max().item(), "tensors": len(before)}


def ship(task: Task, out: Path) -> dict[str, Any]:
    """Export the base with both adapters, and again with the active one merged; compare with PyTorch on test texts."""
    active = RECIPES[-1].name
    swappable = gp.export(task.model, out / "onnx", inputs=task.sample)
    merged = gp.export(task.model, out / "merged", merged=True, inputs=task.sample)
    session = gp.Session(out / "onnx")
    runs = {}
    for name in (None, *(recipe.name for recipe in RECIPES)):
        gp.activate(task.model, name)
        session.use(name)
        runs[name or "base"] = _compare(task, session)
    runs[f"{active}, merged"] = _compare(task, gp.Session(out / "merged"))
    return {"runs": runs, "files": {"onnx": dict(swappable.files), "merged": dict(merged.files)}}


def _compare(task: Task, session: gp.Session) -> dict[str, float]:
    """Accuracy on ONNX Runtime, and the largest difference of its logits from the model's current ones."""
    outputs = (session.run({name: value.numpy() for name, value in b.inputs.items()}) for b in task.testing)
    found = torch.cat([torch.from_numpy(scores) for (scores,) in (output.values() for output in outputs)])
    difference = (found - logits(task.model, task.testing)).abs().max().item()
    return {"accuracy": accuracy(found, task.testing), "difference": difference}
