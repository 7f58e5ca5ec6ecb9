"""The KL of the noise against torch.distributions, and penalties counted once per optimizer step."""

import torch
from checks import build
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import graphpeft as gp
from graphpeft.chain import Transform
from graphpeft.chain.noise import Noise
from graphpeft.state import chains
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


def test_penalty_counts_once_per_step():
    model = gp.apply(build("hand_written"), "q:lora(r=2)", inputs=(torch.randn(1, 3, 32),))
    assert penalty(model) == 0
    (chain,) = chains(model, "default").values()
    weight = chain.factors[1].through(Square()).weight
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    handle = add_penalties(model, optimizer)
    before = weight.detach().clone()
    for _ in range(4):
        (weight.sum() / 4).backward()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before - 0.1 * (1 + 2 * before))  # float32 rounding
    handle.remove()
