"""The command line as a user meets it: output, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from transformers import MambaConfig
from typer.testing import CliRunner
from zoo import llama

import graphpeft as gp
from graphpeft import methods, registered
from graphpeft.capturing.skeleton import skeleton
from graphpeft.cli import complete
from graphpeft.cli.main import app
from graphpeft.errors import RuleError
from graphpeft.inspect.why import why
from graphpeft.match import registry
from graphpeft.rules.rule import coerce

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


def told(*arguments: str) -> Any:
    """What a command prints as JSON."""
    result = run.invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_help_shows_every_command_in_its_panel() -> None:
    text = run.invoke(app, ["--help"], terminal_width=100).output
    panels = re.split(r"╭─ ([\w ]+?) ─+╮", text)
    listed = {name: re.findall(r"^│ (\w+) ", body, re.M) for name, body in zip(panels[1::2], panels[2::2], strict=True)}
    assert {name: found for name, found in listed.items() if name != "Options"} == {
        "Start": ["demo"],
        "Look at a model": ["plan", "sites", "roles", "methods", "why"],
        "Look at what was done": ["explain", "diff", "report", "graph"],
        "Ship": ["merge", "export", "doctor", "run"],
    }


def test_version() -> None:
    assert run.invoke(app, ["--version"]).stdout == f"graphpeft {version('graphpeft')}\n"


def test_plan_as_json_is_the_plan(folder: str) -> None:
    found, plan = told("plan", folder, "qv:lora(r=4)"), gp.plan(skeleton(folder), "qv:lora(r=4)")
    assert (found["trainable"], found["total"], found["rules"]) == (plan.trainable, plan.total, "qv:lora(r=4)")
    assert [site["weight"] for site in found["sites"]] == [e.site.weight for e in plan.entries]
    assert sum(site["parameters"] for site in found["sites"]) == plan.trainable
    assert {site["reason"] for site in found["skipped"]} == {reason for _, reason in plan.skipped}


def test_sites_as_json(folder: str) -> None:
    found = told("sites", folder)["sites"]
    assert [(site["weight"], site["role"]) for site in found] == [
        (s.weight, s.role) for s in gp.sites(skeleton(folder))
    ]


def test_methods_as_json(folder: str) -> None:
    found = {each["method"]: each for each in told("methods", folder, "--target", "q")}
    assert found["lora"]["trained"] == gp.plan(skeleton(folder), "q:lora").trainable
    assert found["lora"]["options"][0] == {"name": "r", "default": 8, "accepts": "int >= 1"}
    assert told("methods")[0]["trained"] is None


def test_passes_are_printed_and_dumped(folder: str, tmp_path: Path) -> None:
    result = run.invoke(app, ["plan", folder, "q:lora", "--print-after", "find", "--dump", str(tmp_path / "dump")])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("LlamaForCausalLM: q:lora"), "what is watched goes to standard error"
    assert result.stderr.startswith("-- after find\n")
    assert {p.name for p in (tmp_path / "dump").iterdir()} >= {"steps.txt", "02-normalize.diff", "04-plan.after.txt"}
    wrong = run.invoke(app, ["plan", folder, "q:lora", "--print-after", "fnd"])
    assert wrong.exit_code == 1
    assert wrong.stderr.startswith("error WatchError: There is no pass 'fnd'. Did you mean 'find'?")
    again = run.invoke(app, ["plan", folder, "q:lora", "--dump", folder])
    assert again.exit_code == 1
    assert "is not an earlier dump" in again.stderr


def test_wrong_usage_and_wrong_paths_have_codes_of_their_own(folder: str, tmp_path: Path) -> None:
    assert run.invoke(app, ["plan", folder]).exit_code == 2
    assert run.invoke(app, ["diff", folder]).exit_code == 2
    (tmp_path / "file").touch()
    found = run.invoke(app, ["graph", folder, str(tmp_path / "none" / "out.json")])
    assert found.exit_code == 1
    assert re.match(r"error WriteError: \S+none\S+ was not written", found.stderr)
    assert len(found.stderr.splitlines()) == 1


def test_debug_shows_the_trace(folder: str) -> None:
    assert isinstance(run.invoke(app, ["plan", folder, "qz:lora", "--debug"]).exception, RuleError)


def to_come(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not hasattr(gp, name), reason=f"gp.{name} is to come")


# -- what was done -------------------------------------------------------------------------------------------------


def test_why(folder: str) -> None:
    path = "model.layers.0.mlp.up_proj"
    result = run.invoke(app, ["why", folder, path, "--rules", "qv:lora"])
    assert result.exit_code == 0, result.output
    assert path in result.stdout
    assert result.stdout.strip() == str(why(skeleton(folder), path, "qv:lora")).strip()
    assert told("why", folder, path) == json.loads(json.dumps(why(skeleton(folder), path).as_dict()))


def test_diff_of_a_model_with_itself_adapted(folder: str) -> None:
    result = run.invoke(app, ["diff", folder, "--rules", "v:lora"])
    assert result.exit_code == 0, result.output
    assert "v_proj" in result.stdout
    assert "q_proj" not in result.stdout
    model = gp.apply(skeleton(folder), "v:lora")
    assert told("diff", folder, "-r", "v:lora") == json.loads(json.dumps(gp.diff(model).as_dict()))


def test_graph_and_diff_of_files(folder: str, tmp_path: Path) -> None:
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    for out, rules in ((one, []), (other, ["-r", "q:lora"])):
        result = run.invoke(app, ["graph", folder, str(out), *rules])
        assert result.exit_code == 0, result.output
        nodes = len(json.loads(out.read_text())["nodes"])
        assert result.stdout.startswith(f"{out}: {nodes} nodes, ")
    same = run.invoke(app, ["diff", str(one), folder])
    assert same.exit_code == 0, same.output
    assert told("diff", str(one), str(one)) == told("diff", folder, folder)
    assert told("diff", str(one), str(other)) != told("diff", str(one), str(one))
    wrong = run.invoke(app, ["graph", folder, str(tmp_path / "out.png")])
    assert wrong.exit_code == 1
    assert ".graphml" in wrong.stderr


@to_come("report")
def test_report(folder: str, tmp_path: Path) -> None:
    result = run.invoke(app, ["report", folder, str(tmp_path / "out.html"), "--rules", "qv:lora"])
    assert result.exit_code == 0, result.output
    assert "<html" in (tmp_path / "out.html").read_text()


@to_come("report")
def test_report_of_a_saved_adapter(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "model")
    gp.apply(model, "q:lora", name="mine")
    gp.save(model, tmp_path / "adapter")
    result = run.invoke(
        app, ["report", str(tmp_path / "model"), str(tmp_path / "out.html"), "-a", str(tmp_path / "adapter")]
    )
    assert result.exit_code == 0, result.output
    assert "mine" in (tmp_path / "out.html").read_text()


# -- completion ----------------------------------------------------------------------------------------------------


def test_lists_that_completion_offers_are_current() -> None:
    assert methods.names() == registered.methods()
    assert set(registry.roles()) | set(registry.ALIASES) <= set(registered.targets())
    for target in registered.targets():
        assert coerce(f"{target}:lora")
    from transformers import CONFIG_MAPPING

    assert set(complete._types()) == set(CONFIG_MAPPING)


def test_what_completion_offers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama-of-mine").mkdir()
    assert {"llama", "llama4", "llama-of-mine/"} <= set(complete.models("llam"))
    assert complete.rules("qk") == ["qkv", "qkvo"]
    assert complete.rules("qv:lora; mlp:l") == ["qv:lora; mlp:lora"]
    assert dict(complete.passes("mer"))["merge"] == registered.passes()["merge"]
    assert [name for name, _ in complete.passes("a")] == ["activate", "apply", "all"]


def completed(*words: str) -> list[str]:
    """What bash is told."""
    given = {"COMP_WORDS": " ".join(["graphpeft", *words]), "COMP_CWORD": str(len(words))}
    found = subprocess.run(
        [sys.executable, "-c", "from graphpeft.cli.main import app; app(prog_name='graphpeft')"],
        env=os.environ | given | {"_GRAPHPEFT_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.split()


def test_completion_as_a_shell_asks_for_it(tmp_path: Path) -> None:
    for name in ("polite.onnx_adapter", "short.encoder.onnx_adapter", "short.decoder.onnx_adapter"):
        (tmp_path / name).touch()
    assert completed("d") == ["demo", "diff", "doctor"]
    assert completed("plan", "llama", "qv:lo") == ["qv:lora"]
    assert completed("plan", "llama", "q:lora", "--print-after", "norm") == ["normalize"]
    assert completed("run", str(tmp_path), "text", "-a", "") == ["polite", "short"]


IMPORTED = """
import sys, graphpeft
before = set(sys.modules)
from typer.testing import CliRunner
from graphpeft.cli.main import app
assert "Ship" in CliRunner().invoke(app, ["--help"]).output
print(*(name for name in sys.modules if name.partition(".")[0] in {"torch", "transformers", "onnx"} and name not in before))
"""


def test_commands_import_nothing_heavy_before_they_run() -> None:
    found = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_explain(folder: str, tmp_path: Path) -> None:
    result = run.invoke(app, ["explain", folder, "--rules", "v:lora"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("default (active): v:lora  —  2 sites, ")
    assert run.invoke(app, ["explain", folder]).exit_code == 2
