"""Merging on disk: the bytes of an in-memory merge, whatever is refused, and what is left when it fails."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import build, randomize, sampled
from merging import Job, contents, forked, job_of, prepare
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, MixtralForCausalLM
from typer.testing import CliRunner
from zoo import mixtral

import graphpeft as gp
from graphpeft.cli.main import app
from graphpeft.errors import AdapterError, FileError, GraphPeftError
from graphpeft.store import folding

METHODS = ["lora(r=4, alpha=8)", "vera(r=16)", "dora(r=4)", "rlora", "olora(r=4)", "melora(n=4, r=2)"]
ROLES = ["q", "k", "v", "o", "up", "down"]
FIRST = "; ".join(map("{}:{}".format, ROLES, METHODS))
SECOND = "; ".join(map("{}:{}".format, ROLES, [*METHODS[3:], *METHODS[:3]]))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A small Llama in shards, an adapter, and what `gp.merge` makes of them."""
    return prepare(tmp_path_factory.mktemp("job"), build("llama", dtype=torch.bfloat16), "qv:lora; mlp:lora")


# -- the same bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rules"),
    [("llama", FIRST), ("llama", SECOND), ("gpt2", FIRST), ("gpt2", SECOND), ("t5", FIRST), ("bert", SECOND)],
    ids=["llama-first", "llama-second", "gpt2-first", "gpt2-second", "t5-first", "bert-second"],
)
def test_the_bytes_are_those_of_a_merge_in_memory(
    name: str, rules: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folding, "BLOCK", 1000)  # several blocks, the last one smaller
    found = prepare(tmp_path, build(name), rules)
    done = found.merge()
    assert done.shards > 1
    assert contents(found.out) == found.expected
    assert contents(found.out) != contents(found.base)
    assert not found.part.exists()
    assert not found.note.exists()


@pytest.mark.parametrize("dtype", sampled([torch.float16, torch.bfloat16, torch.float64], torch.float64))
def test_other_dtypes_round_once(dtype: torch.dtype, tmp_path: Path) -> None:
    found = prepare(tmp_path, build("llama", dtype=dtype), "qv:lora; o:pissa(r=4); mlp:blora(r=4)", shards=False)
    assert found.merge().shards == 1
    assert contents(found.out) == found.expected


def test_adapters_are_folded_in_order(tmp_path: Path) -> None:
    model = build("gpt2", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    for name, rules in (("one", "qv:dora"), ("two", "linear:lora")):
        gp.apply(model, rules, name=name)
        randomize(model, name, std=0.05, seed=len(rules))
        gp.save(model, tmp_path / name, name)
    gp.merge(model, ("one", "two"))
    model.save_pretrained(tmp_path / "expected")
    gp.merge_files(tmp_path / "base", [tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


@pytest.mark.parametrize(("name", "rules"), [("llama", "qv:dora(r=4)"), ("gpt2", "qv:lora(r=4); mlp:lora(r=2)")])
def test_an_adapter_in_the_format_of_peft(name: str, rules: str, tmp_path: Path) -> None:
    found = prepare(tmp_path, build(name), rules, format="peft")
    assert (found.adapter / "adapter_config.json").exists()
    found.merge()
    assert contents(found.out) == found.expected


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_tied_weight_is_merged_under_its_stored_name(name: str, tmp_path: Path) -> None:
    found = prepare(tmp_path, build(name), "embed:lora(r=2)")
    assert found.merge().tensors == 1
    assert contents(found.out) == found.expected


def test_a_tied_weight_that_is_stored_twice_stays_tied(tmp_path: Path) -> None:
    found = prepare(tmp_path, build("gpt2"), "embed:lora(r=2)", shards=False)
    _edit_tensors(lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()})(found)
    assert found.merge().tensors == 2
    merged = load_file(found.out / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], merged["transformer.wte.weight"])


def test_keys_without_the_prefix_of_the_base_model(tmp_path: Path) -> None:
    """As OpenAI's own GPT-2 is stored: transformers adds `transformer.` while it loads."""
    found = prepare(tmp_path, build("gpt2"), "qv:lora; mlp:lora", shards=False)
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    _edit_tensors(lambda tensors: {key.removeprefix("transformer."): t for key, t in tensors.items()})(found)
    found.merge()
    merged = load_file(found.out / "model.safetensors")
    assert "h.0.attn.c_attn.weight" in merged
    assert all(torch.equal(merged[key.removeprefix("transformer.")], t) for key, t in expected.items())


def test_experts_are_left_alone_or_refused(tmp_path: Path) -> None:
    """Mixtral's experts are stored one by one and fused while they load."""
    config = mixtral().config
    config.num_hidden_layers = 1
    model = MixtralForCausalLM(config).eval()
    found = prepare(tmp_path, model, "qv:lora; experts.down:lora(r=2)", spoil=lambda model: None)
    with pytest.raises(FileError, match=r"makes it from model\.layers\.0\S*experts\.0.*gp\.merge, save_pretrained"):
        found.merge()
    assert not found.out.exists()
    assert not found.part.exists()
    attention = replace(found, adapter=tmp_path / "attention")
    gp.remove(model)
    gp.apply(model, "qv:lora")
    randomize(model)
    gp.save(model, attention.adapter)
    assert attention.merge().tensors == 2
    gp.merge(model)
    model.save_pretrained(tmp_path / "expected", max_shard_size="80KB")
    assert contents(found.out) == contents(tmp_path / "expected")


def test_other_files_come_along_but_no_other_weights(tmp_path: Path) -> None:
    found = prepare(tmp_path, build("llama"), "q:lora", shards=False)
    (found.base / "tokenizer.json").write_text("{}")
    (found.base / "1_Pooling").mkdir()
    (found.base / "1_Pooling" / "config.json").write_text("[]")
    for stale in ("pytorch_model.bin", "model.fp16.safetensors", "model.safetensors.index.json"):
        (found.base / stale).write_text("{}")
    (found.base / ".cache").mkdir()
    done = found.merge()
    assert done.left_out == ("model.fp16.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    assert "not copied, because they hold weights of the base or an adapter: model.fp16" in str(done)
    assert {p.relative_to(found.out).as_posix() for p in found.out.rglob("*")} == {
        "1_Pooling", "1_Pooling/config.json", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json",
    }  # fmt: skip


def test_an_empty_folder_may_be_there(job: Job, tmp_path: Path) -> None:
    found = job_of(job, tmp_path)
    found.out.mkdir()
    found.merge()
    assert contents(found.out) == job.expected


def test_the_command(job: Job, tmp_path: Path) -> None:
    found = job_of(job, tmp_path)
    result = CliRunner().invoke(app, ["merge", str(found.base), str(found.adapter), str(found.out), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["tensors"] == 10
    assert contents(found.out) == job.expected
    again = CliRunner().invoke(app, ["merge", str(found.base), str(found.adapter), str(found.out)])
    assert again.exit_code == 1
    assert "exists already" in again.stderr


# -- refusals: before anything is written, and in words ----------------------------------------------------------------


def _edit_tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Job], None]:
    def edit(job: Job) -> None:
        for path in job.base.glob("*.safetensors"):
            save_file(change(load_file(path)), path, {"format": "pt"})

    return edit


def _map(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Job], None]:
    return _edit_tensors(lambda tensors: {k: change(t) if k == key else t for k, t in tensors.items()})


def _shard(job: Job, number: int = 1) -> Path:
    return sorted(job.base.glob("*.safetensors"))[number]


def _cut(job: Job) -> None:
    os.truncate(_shard(job), _shard(job).stat().st_size - 10)


def _header(job: Job) -> None:
    _shard(job).write_bytes(b"\xff" * 100)


def _swap(job: Job) -> None:
    shutil.copyfile(_shard(job, 0), _shard(job, 1))


def _index(text: str) -> Callable[[Job], None]:
    return lambda job: (job.base / "model.safetensors.index.json").write_text(text) and None


def _only_pickle(job: Job) -> None:
    for path in (*job.base.glob("*.safetensors"), job.base / "model.safetensors.index.json"):
        path.unlink()
    (job.base / "pytorch_model.bin").write_bytes(b"")


def _config(job: Job) -> None:
    path = job.base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1}))


Q = "model.layers.1.self_attn.q_proj.weight"
REFUSED: dict[str, tuple[Callable[[Job], Any], str]] = {
    "truncated shard": (_cut, r"model-00002-of-0000\d\.safetensors is damaged: it has [\d,]+ bytes, but its header"),
    "missing shard": (lambda job: _shard(job).unlink(), r"model-00002-of-0000\d\.safetensors cannot be read: No such"),
    "no header": (_header, "is damaged: its header is not a safetensors header"),
    "a shard of another": (_swap, "says that model-00002.* holds .*, but it does not"),
    "no JSON": (_index("{"), "index.json is not readable JSON"),
    "an index that leaves the folder": (_index('{"weight_map": {"a": "../b.safetensors"}}'), "names .'../b.safet"),
    "no safetensors": (_only_pickle, "holds neither model.safetensors nor .* save_pretrained"),
    "other weights": (_map(Q, lambda t: t + 1), "was trained on other base weights than .*--any-base"),
    "integers": (_map(Q, lambda t: t.to(torch.int8)), r"stores model\.layers\.1\S* as I8, to which no update"),
    "a missing tensor": (
        lambda job: (
            _edit_tensors(lambda tensors: {k: t for k, t in tensors.items() if k != Q})(job),
            (job.base / "model.safetensors.index.json").unlink(),
            _join(job),
        ),
        r"does not store model\.layers\.1\.self_attn\.q_proj\.weight as it is",
    ),
    "another config": (_config, r"does not fit LlamaForCausalLM: it adapts model\.layers\.1\."),
    "another shape": (_map(Q, lambda t: t[:32].clone()), r"with shape \(32, 64\), but its config.json says \(64, 64\)"),
    "no adapter": (lambda job: (job.adapter / "adapter.json").unlink(), "is not a graphpeft adapter"),
    "output inside": (lambda job: job.inside(), "is inside .*, whose files are copied"),
    "output exists": (lambda job: job.occupy(job.out), "exists already"),
    "something else's part": (lambda job: job.occupy(job.part), r"out\.part is in the way"),
    "something else's note": (lambda job: job.note.write_text("x"), r"out\.part\.json is in the way"),
}


def _join(job: Job) -> None:
    """All shards in one file."""
    paths = sorted(job.base.glob("*.safetensors"))
    tensors = {key: tensor for path in paths for key, tensor in load_file(path).items()}
    for path in paths:
        path.unlink()
    save_file(tensors, job.base / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_named_and_nothing_is_written(case: str, job: Job, tmp_path: Path) -> None:
    found = job_of(job, tmp_path, copied=True)
    damage, message = REFUSED[case]
    damage(found)
    before = contents(tmp_path)
    with pytest.raises(GraphPeftError, match=message):
        found.merge()
    assert contents(tmp_path) == before


def test_another_base_if_that_is_meant(job: Job, tmp_path: Path) -> None:
    found = job_of(job, tmp_path, copied=True)
    _map(Q, lambda tensor: tensor + 1)(found)
    with pytest.warns(UserWarning, match="was trained on other base weights than"):
        found.merge(any_base=True)
    assert found.out.exists()


@pytest.mark.parametrize("case", sampled(["lora-nan", "lora-inf", "dora-nan", "dora-inf"], "lora-inf", "dora-nan"))
def test_an_update_that_is_not_finite_is_refused(case: str, tmp_path: Path) -> None:
    method, text = case.split("-")
    value = float(text)

    def spoil(model: nn.Module) -> None:
        last = next(p for n, p in model.named_parameters() if "layers.1.self_attn.v_proj.adapters" in n)
        last.data.view(-1)[0] = value

    found = prepare(tmp_path, build("llama"), f"qv:{method}", spoil=spoil)
    with pytest.raises(AdapterError, match=r"layers\.1\S*v_proj\.weight would have NaN .* the update of .*adapter has"):
        found.merge()
    assert not found.out.exists()
    assert not found.part.exists()


def test_a_sum_that_leaves_the_range_of_the_dtype_is_refused(tmp_path: Path) -> None:
    def grow(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if "adapters" in name:
                parameter.data.fill_(300.0)

    found = prepare(tmp_path, build("llama", dtype=torch.float16), "q:lora", spoil=grow)
    with pytest.raises(AdapterError, match=r"the sum is too large for torch\.float16"):
        found.merge()


def test_what_rounds_its_input_is_refused(tmp_path: Path) -> None:
    found = prepare(tmp_path, build("llama"), "q:blora(quantize=all)", spoil=lambda model: None)
    with pytest.raises(AdapterError, match=r"cannot be folded into model\.layers\.0\.self_attn\.q_proj\.weight"):
        found.merge()
    assert not found.part.exists()


# -- what is left when it stops --------------------------------------------------------------------------------------


def test_a_full_disk_leaves_what_is_finished(job: Job, tmp_path: Path) -> None:
    """A limit on the size of files stands for it: it needs no rights, and ends a write in the same way."""
    found = job_of(job, tmp_path)
    sizes = [path.stat().st_size for path in sorted(job.base.glob("*.safetensors"))]
    limit = sizes[0] + 100
    assert max(sizes) > limit

    def full() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(FileError, match=r"could not be finished: .*too large.*stay in out\.part: free disk space"):
            found.merge()

    assert forked(full) == 0
    assert not found.out.exists()
    assert [path.name for path in found.part.iterdir()] == [sorted(job.base.glob("*.safetensors"))[0].name]
    done = found.merge()
    assert done.kept == 1
    assert "1 of them finished by an earlier run" in str(done)
    assert contents(found.out) == job.expected


@pytest.mark.parametrize("options", [{"task_type": "SEQ_CLS"}, {"bias": "lora_only"}], ids=["head", "biases"])
def test_what_peft_trained_of_the_base_is_not_left_out(options: dict[str, Any], tmp_path: Path) -> None:
    base, folder, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    build("bert").save_pretrained(base)
    theirs = get_peft_model(build("bert"), LoraConfig(r=4, target_modules=["query"], **options))
    trained = [p for n, p in theirs.named_parameters() if p.requires_grad and "lora_" not in n]
    assert trained
    theirs.save_pretrained(folder)
    gp.merge_files(base, folder, tmp_path / "same")  # the base's own values are no trouble
    for parameter in trained:
        parameter.data.add_(1.0)
    theirs.save_pretrained(folder)
    with pytest.raises(FileError, match=r"base weights that are not the model's: (bert.*query\.bias|classifier\.bias)"):
        gp.merge_files(base, folder, out)
    assert not out.exists()
    with pytest.warns(UserWarning, match="left out, as any_base=True asks"):
        gp.merge_files(base, folder, out, any_base=True)


def test_an_adapter_in_the_folder_of_its_base_is_not_put_on_twice(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    model = build("llama")
    model.save_pretrained(base)
    gp.apply(model, "qv:lora")
    randomize(model)
    gp.save(model, base, format="peft")
    done = gp.merge_files(base, base, out)
    assert done.left_out == ("adapter_config.json", "adapter_model.safetensors")
    gp.merge(model)
    for name, tensor in AutoModelForCausalLM.from_pretrained(out).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_headers_with_other_numbers_are_refused_before_anything_is_written(job: Job, tmp_path: Path) -> None:
    found = job_of(job, tmp_path, copied=True)
    shard = next(found.base.glob("*.safetensors"))
    data = shard.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for about in (about for name, about in header.items() if name != "__metadata__"):
        about["data_offsets"] = [float(offset) for offset in about["data_offsets"]]
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(FileError, match="its header is not a safetensors header"):
        found.merge()
    assert not found.part.exists()
    assert not found.note.exists()
    with pytest.raises(FileError, match="cannot be an output folder"):
        gp.merge_files(job.base, job.adapter, "/")
