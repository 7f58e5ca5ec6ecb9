"""What plan, explain and diff print, held against files; `--force-regen` writes them anew."""

from __future__ import annotations

import re

import pytest
import torch
from pytest_regressions.file_regression import FileRegressionFixture
from torch import nn
from zoo import gpt2, llama, mixtral, t5

import graphpeft as gp

MODELS = {"llama": llama, "gpt2": gpt2, "t5": t5, "mixtral": mixtral}
RULES = {
    "llama": "qv[layers=1]:rlora(r=16); mlp:lora(r=4)",
    "gpt2": "qv:lora(r=4); mlp:olora(r=2)",
    "t5": "q[cross]:vera(r=16); mlp:lora(r=4)",
    "mixtral": "attn:melora(n=2, r=2); experts:lora(r=2)",
}


@pytest.fixture(scope="module", params=MODELS)
def named(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    torch.manual_seed(0)
    return request.param, MODELS[request.param]().eval()


def check(text: str, view: str, name: str, file_regression: FileRegressionFixture) -> None:
    """Line numbers and quoted lines of transformers change with its version."""
    text = re.sub(r"\.py:\d+", ".py:#", text)
    file_regression.check(re.sub(r"^      \S.*$", "      <code>", text, flags=re.M) + "\n", basename=f"{view}_{name}")


def test_plan(named: tuple[str, nn.Module], file_regression: FileRegressionFixture) -> None:
    name, model = named
    check(str(gp.plan(model, RULES[name])), "plan", name, file_regression)


def test_explain_and_diff(named: tuple[str, nn.Module], file_regression: FileRegressionFixture) -> None:
    name, model = named
    gp.apply(model, RULES[name])
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.fill_(0.01)
    try:
        check(f"{gp.explain(model)}\n\n{gp.diff(model)}", "explain_and_diff", name, file_regression)
    finally:
        gp.remove(model)
