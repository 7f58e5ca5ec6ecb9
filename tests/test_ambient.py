"""Inference mode, autocast, another default dtype or device: what a caller sets in torch changes no site and no number."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from checks import adapters, build, call, delta, outputs, randomize, same, sampled
from exports import tiny
from torch import Tensor, nn

import graphpeft as gp
from graphpeft.ambient import plain
from graphpeft.errors import CaptureError
from graphpeft.rewrite.state import chains

Context = Callable[[], AbstractContextManager[Any]]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


SETTINGS: dict[str, Context] = {
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta context": lambda: torch.device("meta"),
    "meta default": lambda: default_device("meta"),
}
RULES = {
    # Fused projections, whose rows autograd tells, and every way to draw or compute a start.
    "gpt2": "q:vera(r=8); v:olora(r=2); o:dora(r=2); mlp:pissa(r=2)",
    "llama": "qv:rlora(r=8); o:melora(n=2, r=2); mlp:vera(r=8); k:blora(r=2)",
}
BOTH = [(name, setting) for name in RULES for setting in SETTINGS]
TURNS = [(name, setting) for i, setting in enumerate(SETTINGS) for j, name in enumerate(RULES) if i % 2 != j]
"""Every setting, on the models in turn; the others are for -m slow."""


def now() -> tuple[object, ...]:
    given = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    return *given, torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")


def numbers(model: nn.Module) -> dict[str, Tensor]:
    """All of an adapter's tensors, also those that a seed draws and no state dict holds."""
    found = {}
    for site, chain in chains(model, "default").items():
        found |= {f"{site.key} {n}": t.detach().clone() for n, t in (*chain.named_parameters(), *chain.named_buffers())}
    return found


def check_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert tensor.device == other[name].device
        assert torch.equal(tensor, other[name]), name


class Outside:
    """What there is where nothing is set."""

    def __init__(self, name: str, folder: Path) -> None:
        self.model, self.rules = build(name), RULES[name]
        self.call = call(name, self.model)
        self.sites, self.plan = gp.sites(self.model), gp.plan(self.model, self.rules)
        gp.apply(self.model, self.rules)
        self.fresh = numbers(self.model)
        randomize(self.model, std=0.05)
        self.trained, self.outputs = numbers(self.model), outputs(self.model, self.call)[:1]
        self.folder = gp.save(self.model, folder)


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outside]:
    return {name: Outside(name, tmp_path_factory.mktemp("saved") / name) for name in RULES}


@pytest.mark.parametrize("case", sampled(BOTH, *TURNS), ids="-".join)
def test_the_same_sites_plan_and_adapter(case: tuple[str, str], outside: dict[str, Outside]) -> None:
    name, setting = case
    model, known = build(name), outside[name]
    with SETTINGS[setting]():
        assert gp.sites(model).items == known.sites.items
        assert str(gp.plan(model, known.rules)) == str(known.plan)
        gp.apply(model, known.rules, verify="full" if "meta" not in setting else "fast")
        after = now()
    check_equal(numbers(model), known.fresh)
    assert not any(p.is_inference() for p in model.parameters())
    with SETTINGS[setting]():
        assert after == now(), "what was set is set again"
    model(**known.call[1]).logits.sum().backward()
    assert any(p.grad is not None for p in adapters(model).values())


@pytest.mark.parametrize("case", sampled(BOTH, *TURNS), ids="-".join)
def test_the_same_adapter_from_a_file(case: tuple[str, str], outside: dict[str, Outside]) -> None:
    name, setting = case
    model, known = build(name), outside[name]
    with SETTINGS[setting]():
        gp.load(model, known.folder)
    check_equal(numbers(model), known.trained)
    assert same(outputs(model, known.call)[:1], known.outputs)


@pytest.mark.parametrize("setting", sampled(SETTINGS, "no_grad", "float64", "meta context"))
def test_the_same_file_and_the_same_merged_weights(setting: str, outside: dict[str, Outside], tmp_path: Path) -> None:
    model, plain, known = build("gpt2"), build("gpt2"), outside["gpt2"]
    for each in (model, plain):
        gp.load(each, known.folder)
    with SETTINGS[setting]():
        gp.save(model, tmp_path)
        gp.merge(model)
    gp.merge(plain)
    for file in known.folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    assert same(model.state_dict().values(), plain.state_dict().values())
    gp.unmerge(model)
    assert same(outputs(model, known.call)[:1], known.outputs)


@pytest.mark.parametrize(
    "setting", sampled(["inference mode", "autocast", "float64", "meta context"], "autocast", "meta context")
)
def test_the_same_folder_for_peft(setting: str, outside: dict[str, Outside], tmp_path: Path) -> None:
    for name, context in (("in", SETTINGS[setting]), ("out", nullcontext)):
        model = build("llama")
        gp.apply(model, "qv:rlora(r=8); mlp:melora(n=2, r=2)")
        randomize(model)
        with context():
            gp.save(model, tmp_path / name, format="peft")
    for file in (tmp_path / "out").iterdir():
        assert (tmp_path / "in" / file.name).read_bytes() == file.read_bytes()
    loaded = build("llama")
    with SETTINGS[setting]():
        gp.load(loaded, tmp_path / "in")
    x = call("llama", loaded)
    # Chains of three factors and pairs of two sum in other orders: float32.
    assert delta(outputs(loaded, x)[:1], outputs(model, x)[:1]) < 1e-5


@pytest.mark.parametrize(
    "setting", ["inference mode", *(pytest.param(other, marks=pytest.mark.slow) for other in ("autocast", "float64"))]
)
def test_the_same_plain_lora(setting: str, outside: dict[str, Outside]) -> None:
    found = []
    for context in (SETTINGS[setting], nullcontext):
        model = build("llama")
        gp.load(model, outside["llama"].folder)
        with context():
            gp.lower(model)
            gp.combine(model, {"default": 0.5}, "less", "svd", rank=2)
        found.append({n: p.detach() for n, p in model.named_parameters() if "adapters" in n})
    check_equal(*found)


@pytest.mark.parametrize(
    "setting", ["inference mode", *(pytest.param(other, marks=pytest.mark.slow) for other in ("autocast", "float64"))]
)
def test_the_same_answers_and_the_same_export(setting: str, outside: dict[str, Outside], tmp_path: Path) -> None:
    model = tiny("gpt2")
    gp.apply(model, "qv:lora(r=2)")
    randomize(model)
    weight = "transformer.h.0.attn.c_attn"
    answer, told = str(gp.why(model, weight)), str(gp.explain(model))
    with SETTINGS[setting]():
        assert str(gp.why(model, weight)) == answer
        assert str(gp.explain(model)) == told
        report = gp.export(model, tmp_path / "onnx")  # which compares with PyTorch
    assert {check.test for check in report.checks} == {"numbers", "effect", "swap", "slots"}


def test_threads_leave_the_default_dtype_as_it_was() -> None:
    """It is the process's: a thread must not take for the caller's what another one set for a while."""
    models = [build("hand_written") for _ in range(4)]
    x = torch.randn(2, 7, 32)
    with default_dtype(torch.float64):
        threads = [Thread(target=gp.sites, args=(model, (x,))) for model in models for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.get_default_dtype() == torch.float64


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_waits_for_no_thread_of_its_parent() -> None:
    within, done = Event(), Event()

    def hold() -> None:
        with plain():
            within.set()
            done.wait(30)

    thread = Thread(target=hold)
    thread.start()
    within.wait(30)
    child = os.fork()
    if child == 0:
        with plain():
            os._exit(7)
    for _ in range(100):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 7


class Counting(nn.Module):
    """Makes tensors in the default dtype, and fails in another."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x + torch.ones(8)).relu())


def test_code_that_counts_on_the_callers_default_dtype() -> None:
    with default_dtype(torch.bfloat16):
        model = Counting().eval()
        gp.apply(model, "path(one):lora(r=2)", inputs=(torch.randn(2, 3, 8),), verify="full")
    assert model.one.weight.dtype == torch.bfloat16
    assert {p.dtype for p in adapters(model).values()} == {torch.float32}


def test_a_model_made_in_inference_mode_is_refused_or_runs(outside: dict[str, Outside], tmp_path: Path) -> None:
    """Autograd refuses its weights, so nothing can be found or trained; a file names its sites, and runs."""
    known = outside["llama"]
    with torch.inference_mode():
        model = build("llama")
    base = outputs(model, known.call)[:1]
    for act in (gp.sites, partial(gp.plan, rules="qv:lora"), partial(gp.apply, rules="qv:lora")):
        with pytest.raises(CaptureError, match=r"embed_tokens\.weight of .* made inside of torch\.inference_mode"):
            act(model)
    with torch.inference_mode():
        gp.load(model, known.folder)
        assert same(outputs(model, known.call)[:1], known.outputs)
    gp.merge(model)
    # float32: one rounding per weight, carried through two layers.
    assert delta(outputs(model, known.call)[:1], known.outputs) < 1e-5
    gp.remove(model)
    assert same(outputs(model, known.call)[:1], base)
