"""NaN and infinite values of an adapter are named when it is saved and when it is loaded."""

from __future__ import annotations

import warnings
from math import inf, nan
from pathlib import Path

import pytest
import torch
from checks import build, call, outputs, randomize
from torch import nn

import graphpeft as gp
from graphpeft.errors import AdapterError
from graphpeft.methods import builtin
from graphpeft.rewrite.state import chains

RULES = sorted(f"qv:{text}" for method in builtin() for text in (method.examples or {method.name: None}))
SITE = "model.layers.1.self_attn.v_proj"


def spoiled(value: float, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = gp.apply(build("llama").to(dtype), "qv:lora(r=2)")
    randomize(model, "default")
    chain = next(chain for site, chain in chains(model, "default").items() if site.weight.startswith(SITE))
    with torch.no_grad():
        next(chain.parameters()).view(-1)[-1] = value
    return model


@pytest.mark.parametrize("format", ["graphpeft", "peft"])
@pytest.mark.parametrize(
    ("value", "dtype"), [(nan, torch.float32), (inf, torch.float16), (-inf, torch.bfloat16)], ids=str
)
def test_the_tensor_is_named_and_its_values_stay(value: float, dtype: torch.dtype, format: str, tmp_path: Path) -> None:
    model = spoiled(value, dtype)
    with pytest.warns(UserWarning, match=rf"NaN or infinite values in \S*{SITE}\S+\. .*saved as they are") as told:
        gp.save(model, tmp_path, format=format)  # type: ignore[arg-type]
    assert [Path(each.filename).name for each in told] == [Path(__file__).name]
    again = build("llama").to(dtype)
    with pytest.warns(UserWarning, match=rf"NaN or infinite values in \S*{SITE}\S+\. .*loaded as they are") as told:
        gp.load(again, tmp_path)
    assert [Path(each.filename).name for each in told] == [Path(__file__).name]
    (site,) = (site for site in chains(again, "default") if site.weight.startswith(SITE))
    found = [tensor for tensor in chains(again, "default")[site].parameters() if not tensor.isfinite().all()]
    assert [float(each.detach().view(-1)[-1]) for each in found] == [pytest.approx(value, nan_ok=True)]
    with pytest.raises(AdapterError, match=SITE):
        gp.merge(again)


def test_many_are_counted(tmp_path: Path) -> None:
    model = gp.apply(build("llama"), "qv:lora(r=2)")
    for parameter in (p for chain in chains(model, "default").values() for p in chain.parameters()):
        nn.init.constant_(parameter, nan)
    with pytest.warns(UserWarning, match=r"infinite values in \S+, \S+, \S+ and 5 more\."):
        gp.save(model, tmp_path)


def test_swapped_in(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="saved as they are"):
        gp.save(spoiled(nan), tmp_path)
    model = gp.apply(build("llama"), "qv:lora(r=2)")
    with pytest.warns(UserWarning, match=rf"{SITE}\S+\. .*loaded as they are"):
        gp.swap(model, tmp_path)


@pytest.mark.parametrize("rules", RULES)
def test_an_untrained_adapter_of_any_method_says_nothing(rules: str, tmp_path: Path) -> None:
    """Ranges of activations are NaN until the first batch of training."""
    model = gp.apply(build("llama"), rules)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*infinite values")
        gp.save(model, tmp_path)
        gp.load(build("llama"), tmp_path)


def test_a_range_that_nothing_set_is_no_value(tmp_path: Path) -> None:
    model = gp.apply(build("llama"), "qv:blora(r=2, quantize=all)")
    stored = [p for chain in chains(model, "default").values() for p in chain.parameters()]
    assert any(p.isnan().any() for p in stored), "the exception has a reason"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gp.save(model, tmp_path)
        gp.load(build("llama"), tmp_path)
    want = outputs(model, call("llama", model))[0]
    assert want.isfinite().all()
