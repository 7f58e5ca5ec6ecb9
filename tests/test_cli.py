"""The command line as a user meets it: output, exit codes, one-line errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import MambaConfig
from typer.testing import CliRunner
from zoo import llama

import graphpeft as gp
from graphpeft.cli import app
from graphpeft.skeleton import skeleton

run = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    llama().save_pretrained(path)
    (path / "model.safetensors").unlink()  # only the config is needed
    return str(path)


def test_plan_needs_no_weights(folder: str) -> None:
    result = run.invoke(app, ["plan", folder, "qv:rlora"])
    assert result.exit_code == 0, result.output
    assert "4 sites, 384 trainable of" in result.output


def test_sites(folder: str) -> None:
    result = run.invoke(app, ["sites", folder])
    assert result.exit_code == 0, result.output
    assert result.output.count("self_attn.q_proj.weight") == 2


def test_roles_of_a_folder_of_its_config_and_of_a_model_type(folder: str) -> None:
    result = run.invoke(app, ["roles", folder])
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.strip()}
    assert lines["q"] == ["q", "2", "2", "model.layers.*.self_attn.q_proj.weight", "64", "×", "64", "branch"]
    assert "  gate" not in result.stdout.partition("Not found")[2]
    assert "conv: no match: there is no convolution" in result.stdout
    assert run.invoke(app, ["roles", f"{folder}/config.json"]).stdout == result.stdout
    typed = run.invoke(app, ["roles", "gpt2"])
    assert typed.exit_code == 0, typed.output
    assert typed.stdout.startswith("GPT2LMHeadModel")
    fused = next(line for line in typed.stdout.splitlines() if line.startswith("v "))
    assert fused.split()[:5] == ["v", "12", "12", "transformer.h.*.attn.c_attn.weight", "1536:2304"]


def test_roles_as_json(folder: str) -> None:
    result = run.invoke(app, ["roles", folder, "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["model"] == "LlamaForCausalLM"
    (down,) = [role for role in told["roles"] if role["role"] == "down"]
    assert (down["sites"], down["layers"], down["size"], down["form"]) == (2, 2, "64 × 96", "branch")
    assert "conv" in [role for absence in told["absent"] for role in absence["roles"]]
    assert told["unseen"] == []


def test_json_tells_the_nearest_miss(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2)
    config.save_pretrained(tmp_path)
    told = json.loads(run.invoke(app, ["roles", str(tmp_path), "--json"]).stdout)
    (absence,) = [a for a in told["absent"] if "q" in a["roles"]]
    assert absence["outcome"] == "no match"
    assert absence["near"]["place"].startswith("modeling_mamba.py:")
    assert absence["near"]["node"].startswith("matmul (2, ")


def test_methods_lists_options_and_papers() -> None:
    result = run.invoke(app, ["methods"])
    assert result.exit_code == 0, result.output
    assert "rlora" in result.output
    assert re.search(r"lora +r +8 +int >= 1", result.output)
    assert "arXiv:2106.09685" in result.output


def test_methods_counts_on_a_model(folder: str) -> None:
    result = run.invoke(app, ["methods", folder, "--target", "q"])
    assert result.exit_code == 0, result.output
    assert re.search(rf"^lora .* {gp.plan(skeleton(folder), 'q:lora').trainable:,} +yes +rank 8 ", result.output, re.M)
    wrong = run.invoke(app, ["methods", folder, "--target", "z"])
    assert wrong.exit_code == 1
    assert "RuleError" in wrong.output


def test_errors_are_told_without_a_trace(folder: str, tmp_path: Path) -> None:
    result = run.invoke(app, ["plan", folder, "qz:rlora"])
    assert result.exit_code == 1
    assert "RuleError" in result.output
    assert "^" in result.output
    assert "Traceback" not in result.output
    result = run.invoke(app, ["sites", str(tmp_path)])
    assert result.exit_code == 1
    assert "has no config.json" in result.output


UNREADABLE = {
    "lama": "neither a folder, nor a config.json, nor a model type of transformers. Did you mean llama?",
    '{"model_type": "none_such"}': "holds no config that transformers can read",
    "{": "holds no config that transformers can read",
    '{"model_type": "llama", "architectures": ["NoSuchForCausalLM"]}': "names the architecture 'NoSuchForCausalLM'",
    '{"model_type": "llama", "architectures": ["ViTModel"]}': "cannot be built as ViTModel: AttributeError",
    '{"model_type": "clip_vision_model", "num_attention_heads": 5}': "holds no config that transformers can read",
}


@pytest.mark.parametrize("given", UNREADABLE)
def test_what_names_no_model(given: str, tmp_path: Path) -> None:
    if given.startswith("{"):
        (tmp_path / "config.json").write_text(given)
    result = run.invoke(app, ["roles", str(tmp_path) if given.startswith("{") else given])
    assert result.exit_code == 1
    assert "CaptureError" in result.output
    assert UNREADABLE[given] in " ".join(result.output.split())
    assert "Traceback" not in result.output
