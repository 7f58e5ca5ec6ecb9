"""Adapter folders: what is in them, that they restore an adapter exactly, and what becomes of damaged ones."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import Snapshot
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import gpt2, llama, torch_encoder

import graphpeft as gp
from graphpeft.errors import AdapterError, FileError

TOKENS = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))


def trained(model: nn.Module, rules: str, **options: Any) -> nn.Module:
    """The model with an adapter whose every trained number is random: no adapter is then a no-op."""
    gp.apply(model, rules, **options)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


def fresh(build: Any) -> nn.Module:
    """The same base weights in a new model."""
    torch.manual_seed(7)
    return build().eval()


@pytest.mark.parametrize("build", [llama, gpt2], ids=["llama", "gpt2_fused"])
@pytest.mark.parametrize("rules", ["qv:lora(r=4)", "qv:rlora; mlp:lora(alpha=16, rslora=true)"])
def test_a_saved_adapter_gives_the_same_output_on_a_fresh_base(build: Any, rules: str, tmp_path: Path) -> None:
    model = trained(fresh(build), rules, seed=3)
    base = logits(fresh(build))
    adapted = logits(model)
    assert not torch.allclose(adapted, base, atol=1e-3), "the adapter has to do something"
    gp.save(model, tmp_path)
    again = gp.load(fresh(build), tmp_path)
    # The same tensors through the same graph: equal to the bit.
    assert torch.equal(logits(again), adapted)
    assert gp.trainable(again) == gp.trainable(model)
    gp.remove(again)
    assert torch.equal(logits(again), base)


def test_the_weight_form_is_saved_and_loaded(tmp_path: Path) -> None:
    x = torch.randn(2, 7, 32)
    torch.manual_seed(7)
    model = trained(torch_encoder(), "qv:lora; mlp:lora", inputs=x)
    out = model(x)
    gp.save(model, tmp_path)
    torch.manual_seed(7)
    again = gp.load(torch_encoder(), tmp_path).eval()
    assert torch.equal(again(x), out)


def test_only_trained_tensors_are_stored_and_the_seed_gives_the_rest(tmp_path: Path) -> None:
    model = trained(fresh(llama), "qv:rlora", seed=5)
    gp.save(model, tmp_path)
    stored = load_file(tmp_path / "adapter.safetensors")
    assert sum(t.numel() for t in stored.values()) == gp.trainable(model)[0]
    about = json.loads((tmp_path / "adapter.json").read_text())
    assert about["seed"] == 5
    assert about["rules"] == "qv:rlora"
    assert [s["role"] for s in about["sites"]] == ["q", "v", "q", "v"]


def test_saving_while_merged_stores_the_same_file(tmp_path: Path) -> None:
    model = trained(fresh(llama), "qv:lora")
    gp.save(model, tmp_path / "apart")
    gp.merge(model)
    gp.save(model, tmp_path / "merged")
    for file in ("adapter.json", "adapter.safetensors"):
        assert (tmp_path / "apart" / file).read_bytes() == (tmp_path / "merged" / file).read_bytes()


def test_several_adapters_are_saved_by_name_and_loaded_beside_each_other(tmp_path: Path) -> None:
    model = trained(fresh(llama), "q:lora", name="one")
    trained(model, "v:lora", name="two")
    with pytest.raises(AdapterError, match=r"several adapters: one, two.*name='one'"):
        gp.save(model, tmp_path / "x")
    gp.activate(model, ["one", "two"])
    both = logits(model)
    for name in ("one", "two"):
        gp.save(model, tmp_path / name, name)
    again = fresh(llama)
    gp.load(again, tmp_path / "one", name="first")
    gp.load(again, tmp_path / "two")
    gp.activate(again, ["first", "two"])
    assert torch.equal(logits(again), both)


def test_other_base_weights_are_noticed(tmp_path: Path) -> None:
    gp.save(trained(fresh(llama), "qv:lora"), tmp_path)
    other = llama()
    before = Snapshot.of(other)
    with pytest.raises(FileError, match=r"trained on other base weights.*any_base=True"):
        gp.load(other, tmp_path)
    before.check(other)
    with pytest.warns(UserWarning, match="trained on other base weights"):
        gp.load(other, tmp_path, any_base=True)


def test_the_bfloat16_copy_of_a_base_is_that_base(tmp_path: Path) -> None:
    gp.save(trained(fresh(llama), "qv:lora"), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gp.load(fresh(llama).bfloat16(), tmp_path)


def test_base_parameters_that_train_too_are_named(tmp_path: Path) -> None:
    model = trained(fresh(llama), "qv:lora")
    model.lm_head.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"embed_tokens\.weight|lm_head\.weight"):
        gp.save(model, tmp_path)


def _cut_tensors(folder: Path) -> None:
    file = folder / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def _cut_json(folder: Path) -> None:
    file = folder / "adapter.json"
    file.write_text(file.read_text()[:100])


def _edit(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        file = folder / "adapter.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def _foreign_peft(folder: Path) -> None:
    (folder / "adapter.json").unlink()
    (folder / "adapter_config.json").write_text("{}")


def _other_tensors(folder: Path) -> None:
    import hashlib

    save_file({"a": torch.zeros(2)}, folder / "adapter.safetensors")
    digest = hashlib.sha256((folder / "adapter.safetensors").read_bytes()).hexdigest()
    _edit(tensors_sha256=digest)(folder)


def _sites(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "adapter.json").read_text())["sites"])


def _tied_to_itself(folder: Path) -> None:
    first, *rest = _sites(folder)
    _edit(sites=[first | {"tied": [first]}, *rest])(folder)


def _twice(folder: Path) -> None:
    sites = _sites(folder)
    _edit(sites=[*sites, sites[0]])(folder)


DAMAGE = {
    "tensors cut short": (_cut_tensors, "is not the file that adapter.json describes"),
    "tensors missing": (lambda f: (f / "adapter.safetensors").unlink(), "cannot be read"),
    "description cut short": (_cut_json, "not readable JSON"),
    "description missing": (lambda f: (f / "adapter.json").unlink(), "not a graphpeft adapter"),
    "an empty PEFT adapter": (_foreign_peft, "its peft_type is None"),
    "another JSON": (lambda f: (f / "adapter.json").write_text("[1]"), "not a description of a graphpeft adapter"),
    "a newer version": (_edit(version=99), "Update graphpeft"),
    "an unknown site": (_edit(sites=[{"role": "q"}]), "cannot be understood"),
    "a site tied to itself": (_tied_to_itself, "is tied to itself"),
    "a site twice": (_twice, "a site is listed twice"),
    "tensors of something else": (_other_tensors, "tensors and sites disagree"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_folder_is_refused_and_the_model_left_alone(damage: Any, tmp_path: Path) -> None:
    gp.save(trained(fresh(llama), "qv:lora"), tmp_path)
    break_it, message = damage
    break_it(tmp_path)
    model = fresh(llama)
    before, keys = logits(model), list(model.state_dict())
    with pytest.raises(FileError, match=message):
        gp.load(model, tmp_path)
    assert torch.equal(logits(model), before)
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapter_of_another_architecture_is_refused(tmp_path: Path) -> None:
    gp.save(trained(fresh(llama), "qv:lora"), tmp_path)
    model = gpt2()
    keys = list(model.state_dict())
    with pytest.raises(FileError, match=r"adapts model\.layers\.0\.self_attn\.q_proj\.weight .* no such weight"):
        gp.load(model, tmp_path)
    assert list(model.state_dict()) == keys


def test_an_adapter_of_another_size_is_refused(tmp_path: Path) -> None:
    gp.save(trained(fresh(llama), "qv:lora"), tmp_path)
    with pytest.raises(FileError, match=r"shape \(64, 64\), and this model has \(32, 32\)"):
        gp.load(llama(hidden_size=32), tmp_path)


def test_unknown_fields_are_ignored_with_a_warning(tmp_path: Path) -> None:
    gp.save(trained(fresh(llama), "qv:lora"), tmp_path)
    _edit(future="x")(tmp_path)
    with pytest.warns(UserWarning, match="ignores: future"):
        gp.load(fresh(llama), tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(fresh(llama), "qv:lora")
    gp.save(model, tmp_path)
    old = (tmp_path / "adapter.safetensors").read_bytes()

    def fail(self: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    trained(model, "mlp:lora", name="more")
    with pytest.raises(FileError, match="no space"):
        gp.save(model, tmp_path, "more")
    assert (tmp_path / "adapter.safetensors").read_bytes() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.json", "adapter.safetensors"]
