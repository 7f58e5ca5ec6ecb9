"""Which area of the standard library does a docstring come from? A pretrained MiniLM, adapted in its last two layers.

Texts are split by module or class: those of one class, and the functions of one module, never stand in two parts. The head
is trained first on the frozen encoder and shared by all methods. What the frozen lower layers make of each text is computed
once, so that a step costs two layers.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from run_record import Run, ranks
from torch import Tensor, nn

import graphpeft as gp
from graphpeft.demo.data import AREAS, MIN_WORDS, Text, clean, unique
from graphpeft.demo.model import load

LAYERS, LENGTH, BATCH = 2, 32, 16
SIZES = {"train": 80, "validation": 20, "test": 40}
"""Texts of each area in each part."""


@dataclass(frozen=True)
class Grouped(Text):
    """A docstring with the module or class that it belongs to."""

    group: str


def grouped(root: Path) -> Iterator[Grouped]:
    """The docstrings of the areas' modules, without their tests."""
    for area, names in AREAS.items():
        found = (path for name in names.split() for path in [*(root / name).rglob("*.py"), *root.glob(f"{name}.py")])
        for path in sorted(found):
            place = path.relative_to(root)
            if {"test", "tests"} & set(place.parts):
                continue
            for top in (module := ast.parse(path.read_bytes())).body:
                group = f"{place}:{top.name}" if isinstance(top, ast.ClassDef) else str(place)
                for node in ast.walk(top):
                    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                        yield Grouped(clean(ast.get_docstring(node) or "", place.with_suffix("").parts), area, group)
            yield Grouped(clean(ast.get_docstring(module) or "", place.with_suffix("").parts), area, str(place))


@cache
def split() -> dict[str, tuple[Grouped, ...]]:
    """Whole groups, in the order of a hash, go to the part that lacks most; areas that cannot fill all parts are left out."""
    texts = unique(t for t in grouped(Path(sysconfig.get_path("stdlib"))) if len(t.words.split()) >= MIN_WORDS)
    by_group: dict[tuple[str, str], list[Grouped]] = defaultdict(list)
    for text in texts:
        by_group[text.area, text.group].append(text)
    parts: dict[tuple[str, str], list[Grouped]] = defaultdict(list)
    for (area, _), members in sorted(by_group.items(), key=lambda item: _hash(str(item[0]))):
        lacking = max(SIZES, key=lambda part: 1 - len(parts[area, part]) / SIZES[part])
        parts[area, lacking] += sorted(members, key=lambda text: _hash(text.words))
    full = [area for area in AREAS if all(len(parts[area, part]) >= n for part, n in SIZES.items())]
    return {part: tuple(t for area in full for t in parts[area, part][:n]) for part, n in SIZES.items()}


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode()).digest()


def digest() -> str:
    return hashlib.sha256(str(split()).encode()).hexdigest()


class Upper(nn.Module):
    """The encoder's last layers, mean pooling over what is not padding, and the head."""

    def __init__(self, layers: list[nn.Module], head: nn.Linear) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(layers), head

    def features(self, hidden: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask[:, None, None, :].bool())
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """States (batch, length, width) below the layers, mask (batch, length) -> logits."""
        return self.head(self.features(hidden, mask))


Part = tuple[Tensor, Tensor, Tensor]
"""Hidden states, mask, labels."""


@cache
def prepared() -> tuple[Upper, dict[str, Part]]:
    """The frozen model with its trained head, and the three parts as it sees them."""
    texts = split()
    areas = sorted({text.area for text in texts["train"]})
    torch.manual_seed(0)
    classifier, tokenizer = load(len(areas))
    model = Upper(list(classifier.encoder.encoder.layer[-LAYERS:]), classifier.head)
    parts = {}
    for name, members in texts.items():
        words = [text.words for text in members]
        tokens = tokenizer(words, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        mask = tokens["attention_mask"]
        with torch.no_grad():
            states = classifier.encoder(input_ids=tokens["input_ids"], attention_mask=mask, output_hidden_states=True)
        labels = torch.tensor([areas.index(text.area) for text in members])
        parts[name] = (states.hidden_states[-1 - LAYERS], mask, labels)
    _fit_head(model, parts["train"])
    return model.requires_grad_(False).eval(), parts


def _fit_head(model: Upper, training: Part, decay: float = 2e-2) -> None:
    hidden, mask, labels = training
    with torch.no_grad():
        features = model.features(hidden, mask)
    optimizer = torch.optim.LBFGS(model.head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model.head(features), labels) + decay * model.head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    """In percent, in evaluation; the model is left training."""
    model.eval()
    right = sum(int((model(h, m).argmax(-1) == y).sum()) for h, m, y in zip(*(t.split(100) for t in part), strict=True))
    model.train()
    return 100 * right / len(part[2])


@cache
def _base(part: str) -> float:
    base, parts = prepared()
    return accuracy(copy.deepcopy(base), parts[part])


def adapt(method: str, lr: float, seed: int, steps: int, checkpoints: tuple[int, ...], part: str) -> Run:
    """Adapt queries, values and both MLP maps of the last layers; dropout is the pretrained model's own."""
    base, parts = prepared()
    model = copy.deepcopy(base)
    hidden, mask, labels = parts["train"]
    start = _base(part)
    gp.apply(model, f"qv:{method}; mlp:{method}", inputs=(hidden[:2], mask[:2]), seed=seed, verify="off")
    torch.manual_seed(seed)
    order = np.random.default_rng(1000 + seed)
    optimizer = torch.optim.AdamW(gp.parameter_groups(model, lr))
    curve = {0: start}
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        chosen = torch.from_numpy(order.integers(0, len(labels), BATCH))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(hidden[chosen], mask[chosen]), labels[chosen]).backward()
        optimizer.step()
        if step + 1 in (*checkpoints, steps):
            curve[step + 1] = accuracy(model, parts[part])
    return Run(method, lr, seed, gp.trainable(model)[0], curve, ranks(model))
