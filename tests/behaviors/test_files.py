"""Adapters saved and loaded: B12 to B15, B28 and B29 of PEFT's tests."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import torch
from checks import Snapshot, adapters, randomize, same
from grid import HAND_MADE, TARGETS, Cell, apply, cells, close, fresh, models, run
from peft import LoraConfig, PeftModel, VeraConfig
from safetensors.torch import load_file
from torch import nn

import graphpeft as gp
from graphpeft.errors import AdapterError


@cells()
def test_b12_a_saved_adapter_is_itself_on_a_fresh_base(cell: Cell, tmp_path: Path) -> None:
    """To the bit, whatever random state it is loaded in. PEFT allows 1e-5."""
    model = cell.adapted()
    adapted = cell.run(model)
    assert not close(adapted, cell.run(cell.base()), 1e-3)
    gp.save(model, tmp_path)
    torch.manual_seed(99)
    again = gp.load(cell.base(), tmp_path)
    assert same(cell.run(again), adapted)
    assert gp.trainable(again) == gp.trainable(model)
    gp.remove(again)
    assert same(cell.run(again), cell.run(cell.base()))


@pytest.mark.parametrize(
    ("name", "targets"), [("mlp", ["lin0", "lin1"]), ("emb_conv1d", ["emb", "conv1d"]), ("conv2d", ["conv2d", "lin0"])]
)
def test_b12_a_file_of_pefts_is_itself_here(name: str, targets: list[str], tmp_path: Path) -> None:
    """On models without a config: there is no example call, so that weights are known by their paths."""
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, fan_in_fan_out="conv1d" in targets)
    theirs = peft.get_peft_model(fresh(name), config).eval()
    theirs.save_pretrained(str(tmp_path))
    wanted = run(name, theirs)
    assert not close(wanted, run(name, fresh(name)), 1e-3)
    assert close(run(name, gp.load(fresh(name), tmp_path)), wanted, 1e-5)


@cells(HAND_MADE)
def test_b13_a_folder_holds_the_adapter_and_nothing_of_the_base(cell: Cell, tmp_path: Path) -> None:
    model = cell.adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gp.save(model, tmp_path)
        again = gp.load(cell.base(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.json", "adapter.safetensors"]
    assert list(adapters(again)) == list(adapters(model))
    assert same(adapters(again).values(), adapters(model).values())
    assert again.state_dict().keys() == model.state_dict().keys()
    stored = load_file(tmp_path / "adapter.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) <= 2 * gp.trainable(model)[0]
    assert not any(torch.equal(t, p) for t in stored.values() for p in cell.base().parameters())


@models()
def test_b14_names_change_nothing_and_may_begin_alike(name: str, tmp_path: Path) -> None:
    """PEFT puts an adapter that is not called `default` into a folder of its name; here the caller names the folder."""
    target = TARGETS[name][0]
    model = apply(name, fresh(name), f"{target}:lora(r=2)")
    gp.save(model, tmp_path / "default")
    alone = run(name, model)
    gp.remove(model)
    names = ("task", "task_1", "q", "default")
    for each in names:
        gp.load(model, tmp_path / "default", name=each)
        assert same(run(name, model), alone)
    randomize(model, "task", seed=1)
    gp.remove(model, "task")
    assert len({len(adapters(model, each)) for each in names[1:]}) == 1
    gp.activate(model, "q")
    gp.save(model, tmp_path / "q", "q")
    assert same(run(name, gp.load(fresh(name), tmp_path / "q")), alone)
    assert {len(adapters(gp.load(fresh(name), tmp_path / "q"), "q"))} == {len(adapters(model, "task_1"))}


@cells(HAND_MADE)
def test_b15_nothing_is_left_on_the_meta_device(cell: Cell, tmp_path: Path) -> None:
    """Loading makes no tensor that it then throws away. PEFT says `low_cpu_mem_usage=True`."""
    gp.save(cell.adapted(), tmp_path)
    model = gp.load(cell.base(), tmp_path)
    assert {str(t.device) for m in model.modules() for t in (*m.parameters(), *m.buffers())} == {"cpu"}


# -- VeRA ----------------------------------------------------------------------------------------------------------


def projections(model: nn.Module) -> dict[str, set[int]]:
    """Memory of A and of B in all places where they stand."""
    buffers = list(model.named_buffers(remove_duplicate=False))
    return {side: {t.data_ptr() for n, t in buffers if n.endswith(f"bank.{side}")} for side in "AB"}


@models()
def test_b28_projections_are_one_in_memory_and_vectors_are_not(name: str) -> None:
    """Sites of unequal widths among them."""
    model = apply(name, fresh(name), f"{TARGETS[name][0]}:vera(r=8); {TARGETS[name][1]}:vera(r=8)")
    for one in (model, model.double()):
        assert {side: len(held) for side, held in projections(one).items()} == {"A": 1, "B": 1}
    vectors = adapters(model)
    assert len({p.data_ptr() for p in vectors.values()}) == len(vectors) >= 4
    assert all(p.dim() == 1 for p in vectors.values())


def test_b28_projections_are_those_of_peft_and_a_key_makes_others(tmp_path: Path) -> None:
    """PEFT refuses a second adapter with another key; here each adapter has the projections of its own."""
    model = fresh("mlp")
    for adapter, key in (("one", 3), ("two", 5), ("three", 3)):
        apply("mlp", model, f"path(lin*):vera(r=8, key={key})", name=adapter)
    buffers = dict(model.named_buffers(remove_duplicate=False))
    banks = {n.split(".")[2]: t for n, t in buffers.items() if n.endswith("bank.A") and n.startswith("lin0")}
    assert torch.equal(banks["one"], banks["three"])
    assert not torch.equal(banks["one"], banks["two"])
    theirs = peft.get_peft_model(fresh("mlp"), VeraConfig(r=8, target_modules=["lin0", "lin1"], projection_prng_key=3))
    assert torch.equal(banks["one"], theirs.base_model.vera_A["default"])
    gp.activate(model, "two")
    wanted = run("mlp", model)
    gp.save(model, tmp_path, "two")
    assert same(run("mlp", gp.load(model, tmp_path, name="again")), wanted)


@pytest.mark.parametrize("store", ["key", "projection"])
@models("gpt2")
def test_b28_projections_are_saved_or_drawn_again(name: str, store: str, tmp_path: Path) -> None:
    """PEFT says `save_projection`."""
    rules = "; ".join(f"{target}:vera(r=8, store={store})" for target in TARGETS[name])
    model = apply(name, fresh(name), rules)
    gp.save(model, tmp_path)
    shared = [key for key in load_file(tmp_path / "adapter.safetensors") if key.startswith("shared:")]
    assert len(shared) == (2 if store == "projection" else 0)
    torch.manual_seed(99)
    again = gp.load(fresh(name), tmp_path)
    assert same(run(name, again), run(name, model))
    assert not close(run(name, again), run(name, fresh(name)), 1e-3)


# -- OLoRA and PiSSA -----------------------------------------------------------------------------------------------

STARTS = {
    "plain": ("(r=3)", "(r=3)"),
    "ranks": ("(r=3)", "(r=2)"),  # PEFT's rank_pattern
    "alphas": ("(r=3, alpha=6)", "(r=3, alpha=2)"),  # and alpha_pattern
    "rslora": ("(r=3, alpha=6, rslora=true)", "(r=3, alpha=6, rslora=true)"),
    "all": ("(r=3, alpha=6, rslora=true)", "(r=2, alpha=5)"),  # which PEFT refuses to convert
}


@pytest.mark.parametrize("options", STARTS.values(), ids=STARTS.keys())
@pytest.mark.parametrize("method", ["olora", "pissa"])
def test_b29_plain_lora_reproduces_what_began_at_a_decomposition(
    method: str, options: tuple[str, str], tmp_path: Path
) -> None:
    """On the untouched base, also in PEFT, where it takes `path_initial_model_for_weight_conversion`."""
    model = apply("mlp", fresh("mlp"), f"path(lin0):{method}{options[0]}; path(lin1):{method}{options[1]}", std=None)
    assert same(run("mlp", model), run("mlp", fresh("mlp")))
    randomize(model)
    wanted = run("mlp", model)
    gp.save(model, tmp_path / "native")
    gp.save(model, tmp_path / "peft", format="peft")
    gp.lower(model)
    # float32, in another order. PEFT allows 1e-4.
    assert close(run("mlp", model), wanted, 1e-5)
    assert close(run("mlp", PeftModel.from_pretrained(fresh("mlp"), str(tmp_path / "peft")).eval()), wanted, 1e-5)
    assert close(run("mlp", gp.load(fresh("mlp"), tmp_path / "peft")), wanted, 1e-5)
    assert same(run("mlp", gp.load(fresh("mlp"), tmp_path / "native")), wanted)
    assert not close(wanted, run("mlp", fresh("mlp")), 1e-2)


def test_b29_what_has_no_plain_lora_is_refused_and_nothing_is_lowered() -> None:
    model = fresh("mlp")
    apply("mlp", model, "path(lin0):pissa(r=3)", name="one")
    apply("mlp", model, "path(lin*):dora(r=3)", name="two")
    gp.activate(model, ["one", "two"])
    before = Snapshot.of(model)
    with pytest.raises(AdapterError, match=r"Adapter 'two' at lin0\.weight .*depends on the base weight"):
        gp.lower(model)
    before.check(model)


def test_b29_a_rank_above_the_site_is_refused_and_nothing_is_added() -> None:
    for method in ("olora", "pissa"):
        model = fresh("mlp")
        with pytest.raises(AdapterError, match=r"rank 9 .*lin1\.weight.*8 × 20.*r <= 8"):
            apply("mlp", model, f"path(lin*):{method}(r=9)")
        assert list(model.state_dict()) == list(fresh("mlp").state_dict())
