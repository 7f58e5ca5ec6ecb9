"""Models that accelerate dispatched: its hooks stay, adapters act inside them, and weights kept elsewhere are read there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, remove_hook_from_module
from checks import adapters, build, call, delta, outputs, randomize, same
from steps import batches, train
from torch import nn

import graphpeft as gp
from graphpeft.errors import AdapterError, ExportError

RULES = "qv:lora(r=4); embed:lora(r=2); up:dora(r=2); down:olora(r=2)"
"""Branches, a lookup, one that reads the base weight when it runs, and one that is made from it."""
HERE = torch.device("cpu")


def in_place(model: nn.Module, folder: Path) -> None:
    parts = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    accelerate.dispatch_model(model, dict.fromkeys(parts, "cpu"), force_hooks=True)


def to_memory(model: nn.Module, folder: Path, **options: Any) -> None:
    accelerate.cpu_offload(model, execution_device=HERE, **options)


def to_disk(model: nn.Module, folder: Path) -> None:
    accelerate.disk_offload(model, str(folder / "weights"), execution_device=HERE)


def of_a_map(model: nn.Module, folder: Path) -> None:
    """One layer on the device, the other on disk, as `device_map="auto"` gives it."""
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
             "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
    accelerate.dispatch_model(model, parts, main_device="cpu", offload_dir=str(folder / "weights"))


Dispatch = Callable[[nn.Module, Path], None]


@cache
def made() -> nn.Module:
    model = gp.apply(build("llama"), RULES)
    randomize(model)
    return model


def adapted() -> nn.Module:
    return copy.deepcopy(made())


def check(model: nn.Module) -> None:
    """It does what a model without hooks does, adapted and not, and its hooks are there."""
    plain = adapted()
    example = call("llama", plain)
    # The same kernels in the same order.
    assert same(outputs(model, example), outputs(plain, example))
    with gp.disabled(model), gp.disabled(plain):
        base = outputs(plain, example)
        assert same(outputs(model, example), base)
    assert delta(outputs(model, example), base) > 1e-2
    assert same(outputs(model, example), outputs(plain, example))
    hooks = [m for m in model.modules() if isinstance(getattr(m, "_hf_hook", None), AlignDevicesHook)]
    assert {id(m) for m in hooks} >= {id(m) for m in model.modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("dispatch", [in_place, to_memory, of_a_map])
def test_adapters_act_inside_hooks(dispatch: Dispatch, tmp_path: Path) -> None:
    model = build("llama")
    dispatch(model, tmp_path)
    gp.apply(model, RULES)
    randomize(model)
    assert not any(p.is_meta for p in adapters(model).values())
    check(model)
    gp.remove(model)
    example = call("llama", build("llama"))
    assert same(outputs(model, example), outputs(build("llama"), example))


def test_dispatched_after_apply(tmp_path: Path) -> None:
    model = adapted()
    in_place(model, tmp_path)
    check(model)
    gp.merge(model)
    example = call("llama", build("llama"))
    # float32, updates of size about 1 through two layers.
    assert delta(outputs(model, example), outputs(adapted(), example)) < 1e-3
    gp.unmerge(model)
    check(model)


def test_offloaded_after_apply(tmp_path: Path) -> None:
    """Then the adapter is offloaded too: to its owner, which has to ask for it, and where it cannot be trained or saved."""
    model = adapted()
    to_memory(model, tmp_path)
    with pytest.raises(RuntimeError, match="meta"):
        outputs(model, call("llama", build("llama")))
    model = adapted()
    to_memory(model, tmp_path, preload_module_classes=["AdaptedLinear", "AdaptedEmbedding"])
    check(model)
    with pytest.raises(AdapterError, match="Call dispatch_model before"):
        gp.save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_offloaded_models_train_as_others(tmp_path: Path) -> None:
    model, data = build("llama"), batches("llama", 3)
    plain = adapted()
    expected = train(plain, data)
    to_disk(model, tmp_path)
    gp.apply(model, RULES)
    randomize(model)
    assert delta(adapters(plain).values(), adapters(adapted()).values()) > 1e-2
    assert train(model, data) == expected  # the same kernels in the same order
    assert same(adapters(model).values(), adapters(plain).values())


def test_adapters_of_offloaded_models_are_those_of_the_base(tmp_path: Path) -> None:
    """Saved from one and loaded on the other; what has to change weights, or to have all of them, is refused."""
    model = build("llama")
    to_disk(model, tmp_path)
    gp.apply(model, RULES)
    randomize(model)
    gp.save(model, tmp_path / "adapter")
    example = call("llama", build("llama"))
    expected = outputs(adapted(), example)
    assert same(outputs(gp.load(build("llama"), tmp_path / "adapter"), example), expected)
    again = build("llama")
    to_memory(again, tmp_path)
    gp.load(again, tmp_path / "adapter")
    assert same(outputs(again, example), expected)
    assert str(gp.explain(model)) == str(gp.explain(adapted()))
    with pytest.raises(AdapterError, match=r"embed_tokens.weight is offloaded.*`graphpeft merge`"):
        gp.merge(model)
    with pytest.raises(ExportError, match="has no values here"):
        gp.export(model, tmp_path / "onnx")
    check(model)


def test_code_of_others_on_the_instance_is_not_looked_through() -> None:
    """As accelerate's for mixed precision: another graph beneath it would never be called."""
    model = gp.apply(nn.Linear(8, 8), "head:lora", inputs=(torch.randn(2, 8),))
    inner = model.forward
    model.forward = lambda x: inner(x)  # type: ignore[method-assign]
    for act in (lambda: gp.activate(model, None), lambda: gp.remove(model), lambda: gp.merge(model)):
        with pytest.raises(AdapterError, match="was replaced on the instance after its adapters came"):
            act()
    del model.forward
    gp.remove(model)
    assert type(model) is nn.Linear


def test_code_that_runs_as_it_is_may_be_wrapped_on_the_instance() -> None:
    x = torch.randn(2, 3, 32)
    model = build("hand_written")
    base = outputs(model, ((x,), {}))
    gp.apply(model, "q:lora", inputs=(x,))
    randomize(model)
    adapted = outputs(model, ((x,), {}))
    inner = model.forward
    model.forward = lambda x: inner(x)  # type: ignore[method-assign]
    assert same(outputs(model, ((x,), {})), adapted)
    gp.activate(model, None)
    assert same(outputs(model, ((x,), {})), base)
    gp.activate(model, "default")
    assert same(outputs(model, ((x,), {})), adapted)
    del model.forward
    gp.remove(model)
    assert type(model).__name__ == "HandWritten"


def test_hooks_taken_off_leave_the_adapter(tmp_path: Path) -> None:
    model = build("llama")
    in_place(model, tmp_path)
    gp.apply(model, RULES)
    randomize(model)
    remove_hook_from_module(model, recurse=True)
    assert not any(hasattr(m, "_hf_hook") for m in model.modules())
    plain = adapted()
    example = call("llama", plain)
    for active in (None, "default"):
        gp.activate(model, active)
        gp.activate(plain, active)
        assert same(outputs(model, example), outputs(plain, example))
