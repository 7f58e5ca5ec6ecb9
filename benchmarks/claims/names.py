"""Unicode's character names: a small network learns which script a name belongs to, and is adapted to tell categories.

A category is Unicode's: uppercase letter, digit, combining mark and so on. Names are bags of character trigrams, hashed,
without digits and without their script's word, so that the shape of the other words decides. Scripts of the pretraining,
of the shots, of the validation and of the test are four disjoint sets: "DEVANAGARI LETTER KA" has near copies in Devanagari.
"""

from __future__ import annotations

import copy
import hashlib
import sys
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache
from zlib import crc32

import torch
from digits import Labeled, pretrain
from torch import nn

FEATURES, SCRIPTS, MOST = 256, 24, 400
CATEGORIES = ("Ll", "Lm", "Lo", "Lu", "Mc", "Mn", "Nd", "No", "Po", "So")
NUMBERED = {
    "CJK",
    "HANGUL",
    "TANGUT",
    "NUSHU",
    "KHITAN",
    "EGYPTIAN",
    "CUNEIFORM",
    "ANATOLIAN",
    "SIGNWRITING",
    "VARIATION",
}
"""Scripts whose names hardly differ but for a number or a syllable."""


@dataclass(frozen=True)
class Name:
    words: str
    script: str
    category: str


@cache
def named() -> tuple[Name, ...]:
    """All usable names; a script is the first word of several."""
    found = []
    for point in range(sys.maxunicode + 1):
        script, _, words = unicodedata.name(chr(point), "").partition(" ")
        if words and script not in NUMBERED and unicodedata.category(chr(point)) in CATEGORIES:
            found.append(Name(words, script, unicodedata.category(chr(point))))
    return tuple(found)


def digest() -> str:
    """Of the names: they change with Python's version of Unicode."""
    return hashlib.sha256("\n".join(map(str, named())).encode()).hexdigest()


@cache
def scripts() -> dict[str, str]:
    """Script -> part. The largest pretrain, the others go by a hash of their name."""
    counts = Counter(name.script for name in named())
    source = {script for script, _ in counts.most_common(2 * SCRIPTS)[::2]}
    thirds = ("train", "validation", "test")
    return {s: "source" if s in source else thirds[crc32(s.encode()) % 3] for s in sorted(counts)}


@cache
def part(name: str) -> Labeled:
    """Trigrams (n, FEATURES) and labels: scripts of `source`, categories of the other parts, at most MOST of each."""
    chosen = [each for each in named() if scripts()[each.script] == name]
    labels = [each.script if name == "source" else each.category for each in chosen]
    known = sorted(set(labels)) if name == "source" else CATEGORIES
    by_label = defaultdict(list)
    for each, label in sorted(zip(chosen, labels, strict=True), key=lambda pair: crc32(str(pair[0]).encode())):
        by_label[label].append(each)
    rows = [(_trigrams(each.words), i) for i, label in enumerate(known) for each in by_label[label][:MOST]]
    return Labeled(torch.stack([x for x, _ in rows]), torch.tensor([y for _, y in rows]))


def _trigrams(words: str) -> torch.Tensor:
    text = f"  {words}  "
    x = torch.zeros(FEATURES)
    for i in range(len(text) - 2):
        x[crc32(text[i : i + 3].encode()) % FEATURES] += 1
    return x / x.norm() * 4


@cache
def mlp(steps: int = 1500) -> nn.Module:
    """256-128-128, pretrained to tell scripts; its head is for those."""
    torch.manual_seed(0)
    layers = nn.Linear(FEATURES, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, SCRIPTS)
    return pretrain(nn.Sequential(*layers), part("source"), steps, lr=3e-3)


def with_head(data: Labeled, decay: float = 3e-2) -> nn.Module:
    """The pretrained network with a head for categories, fitted to these examples on frozen features, then frozen."""
    model = copy.deepcopy(mlp())
    model[4] = nn.Linear(128, len(CATEGORIES))
    nn.init.zeros_(model[4].weight)
    nn.init.zeros_(model[4].bias)
    features = model[:4](data.x)
    optimizer = torch.optim.LBFGS(model[4].parameters(), max_iter=40, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model[4](features), data.y) + decay * model[4].weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return model.requires_grad_(False)
