"""MELoRA: blocks, ranks, counts, scales; every figure against a dense block-diagonal product."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checks import Snapshot, build, call, delta, outputs, randomize, same
from torch import nn

import graphpeft as gp
from graphpeft.errors import AdapterError, RuleError
from graphpeft.ir.site import Site
from graphpeft.methods import MELoRA
from graphpeft.rules.rule import parse


def site(outputs: int, inputs: int) -> Site:
    return Site("q", "layer.q.weight", None, False, 0, (outputs, inputs))


def dense(chain: Any, n: int) -> torch.Tensor:
    """The update from the definition: block i is s · B_i A_i."""
    B, A = (
        list(f.blocks) if hasattr(f, "blocks") else list(f.weight)
        for f in chain.factors
    )  # fmt: skip
    scales = getattr(chain.factors[0], "scales", (1.0,) * n)
    return chain.scale * torch.block_diag(*(s * b @ a for s, b, a in zip(scales, B, A, strict=True)))


METHODS = [
    (MELoRA(n=4, r=2), 8, 1.0),
    (MELoRA(n=2, r=3, alpha=6), 6, 2.0),
    (MELoRA(n=2, r=3, alpha=6, scale="total"), 6, 1.0),
    (MELoRA(n=4, r=(1, 2, 3, 1), alpha=3), 7, None),
]


@pytest.mark.parametrize(("method", "rank", "scale"), METHODS)
@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (16, 16)])
def test_definition(method: MELoRA, rank: int, scale: float | None, shape: tuple[int, int]) -> None:
    chain = method.chain(site(*shape)).double()
    chain.reset(0, "q")
    assert not chain.delta().any()
    for parameter in chain.parameters():
        nn.init.normal_(parameter)
    expected = dense(chain, method.n)
    # float64, short sums.
    close = dict(atol=1e-12, rtol=0)
    torch.testing.assert_close(chain.delta(), expected, **close)
    assert torch.linalg.matrix_rank(expected) == rank
    assert scale is None or chain.scale == scale
    for leading in [(), (3,), (2, 3)]:
        x, y = (torch.randn(*leading, n, dtype=torch.float64) for n in (shape[1], shape[0]))
        torch.testing.assert_close(chain(x), x @ expected.T, **close)
        torch.testing.assert_close(chain.accumulate(y, x), y + x @ expected.T, **close)
    a, b = chain.to_lora()
    assert a.shape[0] == rank
    torch.testing.assert_close(b @ a, expected, **close)


def test_mini_ranks_have_their_own_scales() -> None:
    chain = MELoRA(n=2, r=(1, 4), alpha=4).chain(site(8, 8))
    assert chain.factors[0].scales == (4.0, 1.0)
    assert chain.trainable() == (1 + 4) * (4 + 4)


@pytest.mark.parametrize("n", [1, 2, 8])
def test_count_does_not_depend_on_n(n: int) -> None:
    assert MELoRA(n=n, r=2).chain(site(16, 24)).trainable() == 2 * 40


def test_each_mini_is_drawn_for_its_own_fan_in() -> None:
    chain = MELoRA(n=4, r=8).chain(site(64, 64))
    chain.reset(0, "q")
    # Uniform on ±1/√(64 / 4).
    assert 0.24 < chain.factors[1].weight.abs().max() <= 0.25


def test_rules_write_tuples() -> None:
    (rule,) = parse("q:melora(n=2, r=(1, 4))")
    assert rule.method == MELoRA(n=2, r=(1, 4))
    assert str(rule) == "q:melora(n=2, r=(1, 4))"
    assert parse("q:melora(n=1, r=(3,))")[0].method == MELoRA(n=1, r=(3,))
    with pytest.raises(RuleError, match=r"(?s)int >= 1 or a tuple of int >= 1"):
        parse("q:melora(n=2, r=(0, 4))")
    with pytest.raises(RuleError, match="3 ranks for n=2"):
        parse("q:melora(n=2, r=(1, 2, 3))")


def test_a_divisor_that_does_not_fit_names_those_that_do() -> None:
    model = build("gpt2")
    before = Snapshot.of(model)
    with pytest.raises(AdapterError, match=r"cannot split .*c_attn\.weight \(q\).*64 × 64.*Admissible n: 1, 2, 4, 8"):
        gp.apply(model, "q:melora(n=3)")
    before.check(model)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["melora(n=4, r=2)", "melora(n=2, r=(1, 3), alpha=4)"])
def test_on_models(name: str, method: str, tmp_path: Path) -> None:
    model = build(name)
    example, before = call(name, model), Snapshot.of(model)
    base = outputs(model, example)
    gp.apply(model, f"qv:{method}", verify="full")
    model.eval()
    assert same(outputs(model, example), base)
    randomize(model)
    adapted = outputs(model, example)
    assert delta(adapted, base) > 1e-3
    gp.save(model, tmp_path)
    assert same(outputs(gp.load(build(name), tmp_path).eval(), example), adapted)
    gp.merge(model)
    # float32, updates of size 0.1 and less through two layers.
    assert delta(outputs(model, example), adapted) < 1e-4
    gp.unmerge(model)
    assert same(outputs(model, example), adapted)
    gp.remove(model)
    before.check(model)
