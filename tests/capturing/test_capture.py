"""A capture that fails says where, why and what to do, and leaves the model as it was."""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from checks import Snapshot
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import graphpeft as gp
from graphpeft.errors import CaptureError

X = torch.randn(2, 7, 8)


class Inner(nn.Module):
    """What goes wrong two modules deep, as a function of (module, x)."""

    def __init__(self, work: Callable[[Inner, Tensor], Any]) -> None:
        super().__init__()
        self.work = work
        self.proj = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(7)

    def forward(self, x: Tensor) -> Any:
        return self.work(self, self.proj(x))


class Outer(nn.Module):
    def __init__(self, work: Callable[[Inner, Tensor], Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": Inner(work)})])

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        return self.layers[0]["mlp"](x) * scale


def branches(module: Inner, x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def counts(module: Inner, x: Tensor) -> Tensor:
    return x * int(x.max())


def misfits(module: Inner, x: Tensor) -> Tensor:
    return x @ torch.ones(3, 3)


def asks_for_cuda(module: Inner, x: Tensor) -> Tensor:
    return x + torch.ones(8, device="cuda")


def mixes_devices(module: Inner, x: Tensor) -> Tensor:
    return x + torch.ones(2, 7, 8, device="meta")


def mixes_dtypes(module: Inner, x: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(x, x, x.double())


def raises(module: Inner, x: Tensor) -> Tensor:
    raise ValueError("this model wants at least 9 tokens")


@torch.library.custom_op("graphpeft_tests::kernel", mutates_args=())
def kernel(x: Tensor) -> Tensor:
    return x.clone()


def runs_a_kernel(module: Inner, x: Tensor) -> Tensor:
    return kernel(x)


INSIDE = r"in layers\.0\.mlp \(Inner\)"
FITS = r"Check that model\(\*\*inputs\) runs.*forward takes \(x, scale\)"
BAD: dict[str, tuple[Callable[[Inner, Tensor], Any], str, str, str]] = {
    "a branch on values": (branches, INSIDE, "branches on the values of a tensor", r"torch\.where"),
    "a number from values": (counts, INSIDE, "the values of a tensor", r"torch\.where"),
    "shapes": (misfits, INSIDE, "the inputs do not fit: shapes mismatch", FITS),
    "a device in code": (asks_for_cuda, INSIDE, "device that this machine does not have", r"model\.to\('cpu'\)"),
    "two devices": (mixes_devices, INSIDE, "different devices meet", "on the model's device"),
    "two dtypes": (mixes_dtypes, INSIDE, "different dtypes meet", FITS),
    "an error of its own": (raises, INSIDE, "its own code raised ValueError", FITS),
    "a custom kernel": (runs_a_kernel, INSIDE, "operator is not supported", r"torch\.library\.register_fake"),
}


def refused(model: nn.Module, given: Any) -> str:
    """The message of the refused capture: short, without torch's files; the model is as it was."""
    before = Snapshot.of(model) if not any(p.is_meta for p in model.parameters()) else None
    training = [m.training for m in model.modules()]
    with pytest.raises(CaptureError) as caught:
        gp.capture(model, given)
    message = str(caught.value)
    assert len(message.splitlines()) <= 6, message
    assert max(map(len, message.splitlines())) <= 200, message
    assert not re.search(r"proxy_tensor|_trace\.py|fake_tensor|/torch/|module\.py|eval_frame|torch\._", message), (
        message
    )
    assert [m.training for m in model.modules()] == training
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    if before is not None:
        before.check(model)
    return message


@pytest.mark.parametrize(("work", "place", "cause", "remedy"), BAD.values(), ids=BAD.keys())
def test_a_report_names_module_line_cause_and_remedy(
    work: Callable[[Inner, Tensor], Any], place: str, cause: str, remedy: str
) -> None:
    if work is asks_for_cuda and torch.cuda.is_available():
        pytest.skip("this machine has the device")
    message = refused(Outer(work).train(), (X,))
    code, first = inspect.getsourcelines(work)
    assert re.search(place, message), message
    assert f"test_capture.py:{first + 1}" in message
    assert code[1].strip() in message
    assert cause in message
    assert re.search(remedy, message, re.DOTALL), message


@pytest.mark.parametrize("work", [branches, misfits])
def test_torch_prints_and_logs_nothing_beside_the_report(
    work: Callable[[Inner, Tensor], Any], capfd: pytest.CaptureFixture[str]
) -> None:
    handlers = [h for name in ("torch", "torch._subclasses.fake_tensor") for h in logging.getLogger(name).handlers]
    refused(Outer(work), (X,))
    assert "".join(capfd.readouterr()) == ""
    assert not any(h.filters for h in handlers)


def test_what_a_model_prints_still_comes_through(capfd: pytest.CaptureFixture[str]) -> None:
    def prints(module: Inner, x: Tensor) -> Tensor:
        print("said", file=sys.stderr)
        return x

    gp.capture(Outer(prints), (X,))
    assert capfd.readouterr().err.strip() == "said"


def test_inputs_of_another_width_name_the_projection_and_the_line_that_calls_it() -> None:
    message = refused(Outer(branches), (X[..., :5],))
    assert "in layers.0.mlp.proj (Linear)" in message
    assert "return self.work(self, self.proj(x))" in message
    assert "the inputs do not fit" in message
    assert re.search(FITS, message)


def test_a_model_of_torchs_own_modules_has_a_path_and_no_line() -> None:
    message = refused(nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(9, 8))), (X,))
    assert "in 1.1 (Linear)" in message
    assert ".py" not in message
    assert "the inputs do not fit" in message


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"y": X}, r"(unexpected keyword argument|missing a required argument).*'[xy]'"),
        ({"scale": 2.0}, r"missing.*'x'"),
        ((X, 1.0, 2.0), "too many positional arguments|takes from 2 to 3 positional arguments"),
    ],
)
def test_a_call_that_does_not_fit_forward(given: Any, reason: str) -> None:
    message = refused(Outer(branches), given)
    assert "does not fit the arguments of forward" in message
    assert re.search(reason, message), message
    line = inspect.getsourcelines(Outer.forward)[1]
    assert f"in Outer, test_capture.py:{line}" in message
    assert re.search(FITS, message)


@pytest.mark.parametrize("given", [5, {"x": object()}, ("text",)])
def test_inputs_that_are_no_tensors(given: Any) -> None:
    message = refused(Outer(branches), given)
    assert "in " in message
    assert "test_capture.py:" in message


class Result:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        return Result(self.layer(x))


def test_an_output_that_is_no_tensor() -> None:
    message = refused(Odd(), (X,))
    assert f"in Odd, test_capture.py:{inspect.getsourcelines(Odd.forward)[1]}" in message
    assert "objects that are neither tensors nor containers" in message
    assert "torch.export.register_dataclass" in message


def test_a_model_without_forward() -> None:
    class Nothing(nn.Module):
        pass

    message = refused(Nothing(), (X,))
    assert "it has no forward" in message
    assert "give the class a forward" in message


def test_a_config_that_names_an_absent_device() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    model = zoo.llama().eval()
    model.config.place = "cuda"

    class Placed(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            return super().forward(input_ids.to(self.config.place), **kwargs)

    model.__class__ = Placed
    message = refused(model, None)
    assert "device that this machine does not have" in message
    assert "return super().forward(input_ids.to(self.config.place), **kwargs)" in message
    assert "neither its config nor its code" in message


def test_weights_on_an_absent_device() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    model = zoo.llama().eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.lm_head.weight = nn.Parameter(torch.empty(128, 64, device="cuda"))
    with pytest.raises(CaptureError) as caught:
        gp.capture(model)
    assert "in lm_head (Linear)" in str(caught.value)
    assert "device that this machine does not have" in str(caught.value)


def test_a_guess_of_inputs_that_fails_says_so() -> None:
    model = zoo.llama().eval()
    model.model.embed_tokens = nn.Linear(3, 3)
    message = refused(model, None)
    assert "in model.embed_tokens (Linear), modeling_llama.py:" in message
    assert "The inputs were made from the config; pass inputs={...}" in message


def test_meta_inputs_for_a_model_with_weights() -> None:
    message = refused(Outer(lambda m, x: x), (X.to("meta"),))
    assert "different devices meet" in message
    assert "in layers.0.mlp.proj (Linear)" in message


def interrupted(module: Inner, x: Tensor) -> Tensor:
    raise KeyboardInterrupt


def test_an_interrupted_capture_leaves_the_model_as_it_was() -> None:
    model = Outer(interrupted).train()
    model.layers[0]["mlp"].norm.eval()
    before, training = Snapshot.of(model), [m.training for m in model.modules()]
    with pytest.raises(KeyboardInterrupt):
        gp.capture(model, (X,))
    before.check(model)
    assert [m.training for m in model.modules()] == training
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    assert model.layers[0]["mlp"].proj(X).requires_grad
