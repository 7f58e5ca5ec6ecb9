from math import sqrt

import pytest
import torch

from graphpeft.methods import RLoRA
from graphpeft.program import Site


def site(outputs: int, inputs: int) -> Site:
    return Site("q", "q.weight", None, False, 0, (outputs, inputs))


@pytest.mark.parametrize("shape", [(768, 768), (4096, 4096), (3072, 768)])
@pytest.mark.parametrize("r", [64, 256])
def test_count_is_the_closed_form(shape: tuple[int, int], r: int) -> None:
    with torch.device("meta"):
        chain = RLoRA(r=r).chain(site(*shape))
    assert chain.trainable() == shape[0] + r
    assert chain.rank == r


def test_published_counts_of_the_same_form() -> None:
    # VeRA's counts, which this form shares: q and v of RoBERTa-base and of LLaMA-7B at r = 256.
    with torch.device("meta"):
        assert 24 * RLoRA().chain(site(768, 768)).trainable() == 24_576
        assert 64 * RLoRA().chain(site(4096, 4096)).trainable() == 278_528


def test_initial_update_is_zero_and_trains_only_out() -> None:
    chain = RLoRA(r=16).chain(site(24, 40))
    chain.reset(0, "q")
    assert not chain.delta().any()
    chain(torch.randn(3, 40)).sum().backward()
    gradients = {name: parameter.grad.abs().sum().item() for name, parameter in chain.named_parameters()}
    assert gradients["factors.0.weight"] > 0
    assert gradients["factors.2.weight"] == 0
    assert len(gradients) == 2


def test_update_has_the_size_of_the_reconstruction() -> None:
    # With out = 1, entries have variance r · (2/r) · 0.1² · (2/d): a standard deviation of 0.2 / √d.
    chain = RLoRA(r=256).chain(site(768, 768))
    chain.reset(0, "q")
    torch.nn.init.ones_(chain.factors[0].weight)
    # 589,824 entries from 256 random pairs of rows: a spread of the std well below one percent.
    assert chain.delta().std().item() == pytest.approx(0.2 / sqrt(768), rel=0.02)


def test_update_has_full_rank_r() -> None:
    chain = RLoRA(r=16).chain(site(100, 72)).double()
    chain.reset(0, "q")
    for parameter in chain.parameters():
        torch.nn.init.normal_(parameter)
    assert torch.linalg.matrix_rank(chain.delta()) == 16


@pytest.mark.parametrize(("shape", "r"), [((64, 64), 64), ((64, 50), 56), ((10, 300), 12), ((1, 8), 1)])
def test_rank_is_cut_to_the_order_of_the_transform(shape: tuple[int, int], r: int) -> None:
    chain = RLoRA().chain(site(*shape))
    assert chain.trainable() == shape[0] + r
    chain.reset(0, "q")
    torch.nn.init.ones_(chain.factors[0].weight)
    x = torch.randn(3, shape[1])
    # float32, sums of at most 300 terms; outputs are of size about 1.
    torch.testing.assert_close(chain(x), x @ chain.delta().T, atol=1e-5, rtol=1e-5)


def test_sites_get_their_own_projections() -> None:
    first, second = (RLoRA(r=16).chain(site(24, 40)) for _ in range(2))
    first.reset(0, "layers.0.q")
    second.reset(0, "layers.1.q")
    assert not torch.equal(first.factors[3].signs, second.factors[3].signs)
    assert not torch.equal(first.factors[3].rows, second.factors[3].rows)
    assert not torch.equal(first.factors[1].rows, second.factors[1].rows)
    assert not torch.equal(first.factors[1].rows, first.factors[3].rows)


def test_nothing_but_the_diagonals_is_stored() -> None:
    assert list(RLoRA(r=16).chain(site(24, 40)).state_dict()) == ["factors.0.weight", "factors.2.weight"]
