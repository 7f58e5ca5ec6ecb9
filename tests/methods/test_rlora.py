from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import build, call, delta, outputs, randomize, same

import graphpeft as gp
from graphpeft.chain import SRHT, AdjointSRHT, hadamard_matrix
from graphpeft.chain.seeds import generator
from graphpeft.ir.site import Site
from graphpeft.methods import RLoRA


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


@pytest.mark.parametrize(("shape", "r"), [((64, 64), 64), ((64, 50), 52), ((10, 300), 12), ((1, 8), 1)])
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


VARIANTS = ["out_mid", "in_out", "in_mid_out", "core", "b_only"]
COUNTS = {"out_mid": 40 + 8, "in_out": 40 + 24, "in_mid_out": 40 + 8 + 24, "core": 64, "b_only": 8 * 40}


@pytest.mark.parametrize("rows", ["grid", "uniform"])
@pytest.mark.parametrize("train", VARIANTS)
def test_variants(train: str, rows: str) -> None:
    chain = RLoRA(r=8, train=train, rows=rows).chain(site(40, 24)).double()
    chain.reset(0, "q")
    assert not chain.delta().any()
    assert chain.trainable() == COUNTS[train]
    for parameter in chain.parameters():
        torch.nn.init.normal_(parameter)
    assert torch.linalg.matrix_rank(chain.delta()) == 8
    x, y = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(2, 5, 40, dtype=torch.float64)
    # float64, sums of at most 40 terms.
    torch.testing.assert_close(chain(x), x @ chain.delta().T, atol=1e-12, rtol=0)
    torch.testing.assert_close(chain.accumulate(y, x), y + x @ chain.delta().T, atol=1e-12, rtol=0)
    a, b = chain.to_lora()
    assert a.shape == (8, 24)
    torch.testing.assert_close(b @ a, chain.delta(), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("d", "r"), [(64, 16), (64, 64), (100, 7), (768, 251), (12, 12), (20, 19)])
def test_a_grid_is_rows_of_one_hadamard_matrix(d: int, r: int) -> None:
    sketch = SRHT(r, d, scale=1.0, rows="grid")
    frame = AdjointSRHT(d, r, scale=1.0, rows="grid")
    for factor in (sketch, frame):
        factor.reset(lambda name: generator(0, name))
        whole = np.kron(*map(hadamard_matrix, factor.split))[:, :d]
        mine = factor.matrix() if factor is sketch else factor.matrix().T
        assert mine.shape == (r, d)
        unsigned = (mine * factor.signs).numpy()
        places = [int(np.flatnonzero((whole == row).all(1))[0]) for row in unsigned]  # each is a row of H
        assert len(set(places)) == r
        assert places != list(range(r))  # not the first ones, which see sums of strided blocks alone
    x, z = torch.randn(3, d), torch.randn(3, r)
    # float32, sums of up to 768 terms of size about 1.
    torch.testing.assert_close(sketch(x), x @ sketch.matrix().T, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(frame(z), z @ frame.matrix().T, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("train", VARIANTS)
def test_variants_on_a_model(train: str, tmp_path: Path) -> None:
    model = build("gpt2")
    example = call("gpt2", model)
    base = outputs(model, example)
    gp.apply(model, f"qv:rlora(r=16, train={train})", verify="full")
    model.eval()
    assert same(outputs(model, example), base)
    randomize(model)
    adapted = outputs(model, example)
    assert delta(adapted, base) > 1e-3
    gp.save(model, tmp_path)
    assert same(outputs(gp.load(build("gpt2"), tmp_path).eval(), example), adapted)
    gp.merge(model)
    # float32, updates of size 1 and less through two layers.
    assert delta(outputs(model, example), adapted) < 1e-3
