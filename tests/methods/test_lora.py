from math import sqrt

import pytest
import torch
from torch import nn

from graphpeft.ir.site import Site
from graphpeft.methods import LoRA


def site(outputs: int, inputs: int) -> Site:
    return Site("q", "q.weight", None, False, 0, (outputs, inputs))


@pytest.mark.parametrize("shape", [(768, 768), (4096, 4096), (3072, 768)])
@pytest.mark.parametrize("r", [1, 8, 64])
def test_count_is_the_closed_form(shape: tuple[int, int], r: int) -> None:
    with torch.device("meta"):
        chain = LoRA(r=r).chain(site(*shape))
    assert chain.trainable() == r * sum(shape)
    assert chain.rank == min(r, *shape)


def test_published_counts() -> None:
    # q and v of RoBERTa-base at r = 8, q and v of LLaMA-7B at r = 64.
    with torch.device("meta"):
        assert 24 * LoRA(r=8).chain(site(768, 768)).trainable() == 294_912
        assert 64 * LoRA(r=64).chain(site(4096, 4096)).trainable() == 33_554_432


def test_initial_update_is_zero_and_trains_only_b() -> None:
    chain = LoRA(r=4).chain(site(10, 12))
    chain.reset(0, "q")
    assert not chain.delta().any()
    chain(torch.randn(3, 12)).sum().backward()
    b, a = chain.factors
    assert b.weight.grad.abs().sum() > 0
    assert not a.weight.grad.any()


@pytest.mark.parametrize(
    ("method", "scale"),
    [
        (LoRA(r=4), 1.0),
        (LoRA(r=4, alpha=8), 2.0),
        (LoRA(r=4, rslora=True), 4 / sqrt(4)),
        (LoRA(r=4, alpha=8, rslora=True), 8 / sqrt(4)),
    ],
)
def test_scale(method: LoRA, scale: float) -> None:
    assert method.chain(site(5, 6)).scale == scale


def test_dropout_is_that_of_the_chain() -> None:
    assert LoRA(dropout=0.3).chain(site(5, 6)).probability == 0.3
    assert LoRA().chain(site(5, 6)).probability == 0


def test_rank_may_exceed_the_site() -> None:
    chain = LoRA(r=16).chain(site(5, 6))
    chain.reset(0, "q")
    assert chain.trainable() == 16 * 11
    assert chain.rank == 5


@pytest.mark.parametrize(("alpha", "rslora"), [(16, False), (8, True)])
def test_peft_computes_the_same(alpha: int, rslora: bool) -> None:
    peft = pytest.importorskip("peft")
    linear = nn.Linear(12, 10)
    config = peft.LoraConfig(r=4, lora_alpha=alpha, use_rslora=rslora, target_modules=["0"], lora_dropout=0.0)
    theirs = peft.get_peft_model(nn.Sequential(linear), config)
    chain = LoRA(r=4, alpha=alpha, rslora=rslora).chain(site(10, 12))
    chain.reset(0, "q")
    b, a = chain.factors
    nn.init.normal_(b.weight)
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(a.weight)
        layer.lora_B["default"].weight.copy_(b.weight)
    x = torch.randn(3, 12)
    # float32, sums of 12 products of size about 1 in another order.
    torch.testing.assert_close(chain.accumulate(layer.base_layer(x), x), theirs(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(chain.delta(), layer.get_delta_weight("default"), atol=1e-5, rtol=1e-5)
    # Both draw A uniformly on ±1/√inputs.
    assert a.weight.abs().max() <= 12**-0.5
