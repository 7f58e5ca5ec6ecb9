"""Text from an exported decoder. The oracles are transformers' `generate` and onnxruntime-genai."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import sampled
from exports import arrays, deployed, ids, running, serving
from transformers import GenerationConfig, GenerationMixin

import graphpeft as gp
from graphpeft.errors import AdapterError
from graphpeft.exporting import onnx
from graphpeft.runtime.session import Session

USES = (None, "a", "b")
DECODERS = ("llama", "gpt2", "qwen3")
NEVER = 128
"""The end of text where there should be none: no token of these models. None would stand for the model's own."""
START = {"t5": 0, "whisper": 1}
MODELS = sampled((*DECODERS, "t5", "whisper"), "gpt2", "qwen3", "whisper")


def prompt(name: str) -> dict[str, torch.Tensor]:
    """Three rows, one padded where the model is padded."""
    if name == "whisper":
        return {"input_features": torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(9))}
    return ids(3, 7, right=2) if name == "t5" else ids(3, 7, left=2)


def told(name: str, use: str | list[str] | None, count: int = 20, eos: int = NEVER) -> np.ndarray:
    """The tokens of transformers, the start token of a decoder included, which Whisper's own `generate` strips."""
    model = serving(name).model
    config = GenerationConfig(
        do_sample=False, max_new_tokens=count, eos_token_id=eos, pad_token_id=0, decoder_start_token_id=START.get(name)
    )
    gp.activate(model, use)
    with torch.no_grad():
        return GenerationMixin.generate(model, **prompt(name), generation_config=config).numpy()


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_transformers(name: str) -> None:
    session, inputs, seen = Session(serving(name).folder), arrays(prompt(name)), set()
    for use in (*USES, "a", None):
        session.use(use)
        got = session.generate(inputs, 20, stop=[])
        assert np.array_equal(got, told(name, use))
        seen.add(got.tobytes())
    assert len(seen) == 3  # with IO binding, ONNX Runtime would ignore an active adapter in silence
    assert len(np.unique(got[:, -20:])) > 5  # a model that repeats one token shows little


def test_a_blend_of_all_of_two_is_both_at_once() -> None:
    session = Session(serving("llama").folder)
    session.use({"a": 1.0, "b": 1.0})
    got = session.generate(arrays(prompt("llama")), 20, stop=[])
    assert np.array_equal(got, told("llama", ["a", "b"]))
    assert not any(np.array_equal(got, told("llama", use)) for use in USES)


@pytest.mark.parametrize("name", sampled(DECODERS, "gpt2", "qwen3"))
def test_onnxruntime_genai_says_the_same(name: str) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    folder, given = serving(name).folder, {"input_ids": ids(1, 7)["input_ids"].numpy()}
    session, model = Session(folder), og.Model(str(folder))
    adapters = og.Adapters(model)
    for use in "ab":
        adapters.load(str(folder / f"{use}.onnx_adapter"), use)
    ends = json.loads((folder / "genai_config.json").read_text())["model"]["eos_token_id"]
    ends = ends if isinstance(ends, list) else [ends]
    seen = set()
    for use in USES:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=27, do_sample=False)
        generator = og.Generator(model, params)
        if use:
            generator.set_active_adapter(adapters, use)
        generator.append_tokens(given["input_ids"].astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        got = np.asarray(generator.get_sequence(0)).tolist()
        session.use(use)
        assert got == session.generate(given, 20, stop=ends)[0].tolist()
        assert len(got) > 7 + 5
        seen.add(tuple(got))
    assert len(seen) == 3


# -- the end of a row ----------------------------------------------------------------------------------------------


def test_a_row_ends_at_a_stop_token_and_is_padded() -> None:
    session, inputs = Session(serving("llama").folder), arrays(prompt("llama"))
    session.use("a")
    free = session.generate(inputs, 20, stop=[])
    end = int(free[0, 7 + 4])
    got = session.generate(inputs, 20, stop=[end])
    want = told("llama", "a", eos=end)
    assert np.array_equal(got, want)
    row = got[0, 7:].tolist()
    assert end in row[:5]
    assert not any(row[row.index(end) + 1 :])
    assert not np.array_equal(got, free)


def test_stop_tokens_of_the_model_are_the_default_and_end_the_whole_batch(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(serving("llama").folder, tmp_path / "copy"))
    first = Session(folder).generate(arrays(prompt("llama")), 1, stop=[])[:, -1]
    assert Session(folder).graphs["model"].facts["eos_token_id"] == [2]
    tokens = {"eos_token_id": first.tolist(), "pad_token_id": 0}
    onnx.annotate(folder / "model.onnx", {"graphpeft.generation": json.dumps(tokens)})
    assert Session(folder).generate(arrays(prompt("llama")), 20).shape == (3, 7 + 1)
    assert Session(folder).generate(arrays(prompt("llama")), 20, stop=[]).shape == (3, 7 + 20)


# -- sampling ------------------------------------------------------------------------------------------------------

ROWS = 4000


def drawn(**options: float) -> np.ndarray:
    """How often each token follows one prompt."""
    given = np.repeat(ids(1, 7)["input_ids"].numpy(), ROWS, 0)
    found = Session(serving("llama").folder).generate({"input_ids": given}, 1, seed=0, **options)
    return np.bincount(found[:, -1], minlength=128)


def share(temperature: float) -> np.ndarray:
    """PyTorch's probability of each token after that prompt."""
    logits = torch.from_numpy(running(serving("llama").model, None, ids(1, 7))[0, -1])
    return torch.softmax(logits.double() / temperature, -1).numpy()


def surprise(counts: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's chi-squared, in standard deviations from its mean; tokens that are expected less than 5 times pooled."""
    rare = expected * counts.sum() < 5
    seen = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum()) * counts.sum()
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    return float((((seen - wanted) ** 2 / wanted).sum() - (len(seen) - 1)) / (2 * (len(seen) - 1)) ** 0.5)


def test_frequencies_are_those_of_the_softmax() -> None:
    # Under the right distribution a value beyond 4 is drawn once in thousands of seeds; the wrong ones are far beyond.
    counts = drawn(temperature=0.7)
    assert surprise(counts, share(0.7)) < 4
    assert surprise(counts, share(1.0)) > 8
    assert surprise(drawn(temperature=1.0), share(1.0)) < 4


def test_top_k_and_top_p_draw_from_the_likeliest_alone() -> None:
    likeliest = np.argsort(-share(1.0))
    for options, kept in (
        ({"top_k": 5}, likeliest[:5]),
        ({"top_p": 0.6}, likeliest[: int((share(1.0)[likeliest].cumsum() < 0.6).sum()) + 1]),
    ):
        counts = drawn(temperature=1.0, **options)
        assert set(np.flatnonzero(counts)) == set(kept)
        cut = np.where(np.isin(np.arange(128), kept), share(1.0), 0)
        assert surprise(counts[kept], (cut / cut.sum())[kept]) < 4  # as above


def test_a_seed_repeats_and_one_choice_is_greedy() -> None:
    session, inputs = Session(serving("llama").folder), arrays(prompt("llama"))

    def tokens(**options: float) -> bytes:
        return session.generate(inputs, 12, stop=[], **options).tobytes()

    assert tokens(temperature=1.0, seed=1) == tokens(temperature=1.0, seed=1)
    assert tokens(temperature=1.0, seed=1) != tokens(temperature=1.0, seed=2)
    assert tokens(temperature=1.0, top_k=1) == tokens()
    assert tokens(temperature=1.0, top_p=1e-6) == tokens()


# -- refusals ------------------------------------------------------------------------------------------------------


def test_a_prompt_padded_on_the_right_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"padded on the right.*Pad it on the left"):
        Session(serving("llama").folder).generate(arrays(ids(3, 7, right=2)))


def test_a_graph_without_a_past_is_refused() -> None:
    with pytest.raises(AdapterError, match="has no KV cache; export the model with cache=True"):
        Session(deployed().folder).generate({"input_ids": ids(1, 4)["input_ids"].numpy()})


@pytest.mark.parametrize("options", [{"temperature": float("nan")}, {"temperature": -1.0}, {"seed": -1}], ids=str)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(AdapterError, match=r"temperature=.*seed="):
        Session(serving("llama").folder).generate(arrays(prompt("llama")), **options)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"input_ids has shape \(1, 0\)"):
        Session(serving("llama").folder).generate({"input_ids": np.zeros((1, 0), np.int64)})
