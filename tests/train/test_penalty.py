"""The KL of the noise against torch.distributions, and penalties counted once per optimizer step."""

import pytest
import torch
from checks import build
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import graphpeft as gp
from graphpeft.chain import Transform
from graphpeft.chain.noise import Noise
from graphpeft.rewrite.state import chains
from graphpeft.train import add_penalties, penalty


class Square(Transform):
    def forward(self, weight: Tensor) -> Tensor:
        return weight

    def penalty(self, weight: Tensor) -> Tensor:
        return weight.square().sum()


def test_kl_is_that_of_two_gaussians_and_evaluation_has_no_noise():
    torch.manual_seed(0)
    start = torch.randn(3, 5, dtype=torch.float64)
    noise, weight = Noise(start, 0.1), start + 0.2 * torch.randn_like(start)
    nn.init.normal_(noise.log_sigma)
    sigma = noise.log_sigma.detach().exp()
    prior = ((sigma**2 + (weight - start) ** 2).mean()).sqrt()
    expected = kl_divergence(Normal(weight, sigma), Normal(start, prior)).sum()
    torch.testing.assert_close(noise.kl(weight), expected)  # default tolerances: float64 rounding
    noise.redraw()
    assert torch.equal(noise(weight), weight + noise.log_sigma.exp() * noise.draw)
    assert not torch.equal(noise(weight), weight)
    assert noise.eval()(weight) is weight


@pytest.fixture
def squared() -> tuple[nn.Module, nn.Parameter]:
    """A model, and a tensor of its adapter whose squares are penalized."""
    model = gp.apply(build("hand_written"), "q:lora(r=2)", inputs=(torch.randn(1, 3, 32),))
    assert penalty(model) == 0
    (chain,) = chains(model, "default").values()
    return model, chain.factors[1].with_transforms(Square()).weight


def test_penalty_counts_once_per_step(squared: tuple[nn.Module, nn.Parameter]):
    model, weight = squared
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    handle = add_penalties(model, optimizer)
    before = weight.detach().clone()
    for _ in range(4):
        (weight.sum() / 4).backward()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before - 0.1 * (1 + 2 * before))  # float32 rounding
    assert add_penalties(model, optimizer) is handle
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    handle.remove()
    assert not optimizer._optimizer_step_pre_hooks


def test_penalties_of_blocks_and_of_what_sites_share():
    model = gp.apply(build("llama"), "q:melora(n=2, r=(1, 2))")
    every = chains(model, "default").values()
    for chain in every:
        chain.factors[1].parts[1].with_transforms(Square())
    expected = sum(chain.factors[1].blocks[1].square().sum() for chain in every)
    assert expected > 0
    torch.testing.assert_close(penalty(model), expected)
    first, second = every
    second.factors[1] = first.factors[1]
    torch.testing.assert_close(penalty(model), first.factors[1].blocks[1].square().sum())


def test_penalty_is_added_after_unscaling(squared: tuple[nn.Module, nn.Parameter]):
    model, weight = squared
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    add_penalties(model, optimizer)
    before = weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(weight.sum()).backward()
    torch.testing.assert_close(weight.grad, torch.full_like(weight, 2.0**10))
    scaler.step(optimizer)
    # Powers of two scale without rounding; the rest is that of float32.
    torch.testing.assert_close(weight.detach(), before - 0.1 * (1 + 2 * before))
    scaler.update()
    scaler.scale(weight.sum() * torch.inf).backward()
    stopped = weight.detach().clone()
    scaler.step(optimizer)
    assert torch.equal(weight, stopped), "a step that overflowed is skipped, and its penalty too"
