"""PAC-Bayes regularization of any adapter: Gaussian noise on what it trains, and the divergence from where it began.

    loss(θ + σ ε) + (KL + c) / (m γ) + 3/2 K² γ

(PAC-tuning: Liu et al., EMNLP 2023, arXiv:2310.17588, from which RLoRA's regularizer is taken to descend). The prior of
each tensor is centered on its initial value, with the variance that minimizes the KL. Evaluation, merging, saving and
export use the mean θ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graphpeft.chain import Noise, Stack, Weighted
from graphpeft.errors import AdapterError, RuleError
from graphpeft.owner import relower
from graphpeft.state import chains, find_state, get_state, names, owners, refuse_merged


@dataclass
class PAC:
    """The objective's numbers. `attach` it after `gp.apply` and before the optimizer is made.

    `gamma` of some 10² to 10⁴ is a temperature: the bound then holds, and says little. With `gamma="optimal"` it is the
    minimizer √(2 (KL + c) / (3 m)) / K, at which few examples pull an adapter back to where it began. `sigma` is the
    noise's initial standard deviation; zero-initialized tensors have no scale of their own to take it from.
    """

    examples: int
    """m, the number of training examples."""
    gamma: float | Literal["optimal"] = 1000.0
    K: float = 1.0
    """How far losses spread: E exp(γ (mean − loss)) ≤ exp(3/2 K² γ²)."""
    sigma: float = 0.03
    confidence: float = 0.05
    """The probability with which the bound may fail; c = ln(1 / confidence)."""
    frozen: bool = False
    """In the second stage σ is fixed, the noise stays and the KL is dropped."""

    def __post_init__(self) -> None:
        gamma = 1.0 if self.gamma == "optimal" else self.gamma
        for name, value in {"examples": self.examples, "gamma": gamma, "K": self.K, "sigma": self.sigma}.items():
            if not value > 0:
                raise RuleError(f"PAC: {name} = {value} is not > 0.")
        if not 0 < self.confidence < 1:
            raise RuleError(f"PAC: confidence = {self.confidence} is not between 0 and 1.")

    def attach(self, model: nn.Module, name: str | None = None) -> PAC:
        """Put noise on every trained tensor of the adapter (the active ones without a name); returns itself.

        Raises `AdapterError`, and changes nothing, if an adapter has such an objective already or tensors that take no
        noise (stacked experts, mini adapters of unequal ranks), or if the model is merged.
        """
        refuse_merged(model, "attach noise")
        state = get_state(model)
        chosen = state.active if name is None else names(model, name)
        factors = [factor for each in chosen for factor in _factors(model, each)]
        for each in chosen:
            if state.adapters[each].objective is not None:
                raise AdapterError(f"Adapter {each!r} has a PAC objective already. Call its detach(model) first.")
        for factor in factors:
            factor.through(Noise(factor.weight, self.sigma))
        for each in chosen:
            state.adapters[each].objective = self
        if not any(hook is _redraw for hook in model._forward_pre_hooks.values()):
            model.register_forward_pre_hook(_redraw)
        _relower(model, chosen)
        return self

    def detach(self, model: nn.Module) -> None:
        """Take the noise off again; what was trained stays, as the mean."""
        state = get_state(model)
        mine = tuple(n for n, adapter in state.adapters.items() if adapter.objective is self)
        for name in mine:
            for factor in _factors(model, name):
                kept = [t for t in factor.applied if not isinstance(t, Noise)]
                del factor.transforms
                if kept:
                    factor.through(*kept)
            state.adapters[name].objective = None
        _relower(model, mine)
        if not any(adapter.objective for adapter in state.adapters.values()):
            for key in [key for key, hook in model._forward_pre_hooks.items() if hook is _redraw]:
                del model._forward_pre_hooks[key]

    def freeze(self, model: nn.Module) -> None:
        """The second stage: σ is fixed, the noise stays, the KL is dropped."""
        self.frozen = True
        for _, noise in self._noises(model):
            noise.log_sigma.requires_grad_(False)

    def kl(self, model: nn.Module) -> Tensor:
        """KL(posterior ‖ prior) over all tensors, a scalar."""
        return torch.stack([noise.kl(factor.weight) for factor, noise in self._noises(model)]).sum()

    def penalty(self, model: nn.Module) -> Tensor:
        """What the bound adds to the training loss; zero in the second stage."""
        kl = self.kl(model)
        if self.frozen:
            return torch.zeros_like(kl)
        whole = kl - torch.tensor(self.confidence).log().to(kl)
        if self.gamma == "optimal":
            gamma = whole.detach().mul(2 / (3 * self.examples)).sqrt() / self.K
            return whole / (self.examples * gamma) + 1.5 * self.K**2 * gamma
        return whole / (self.examples * self.gamma) + 1.5 * self.K**2 * self.gamma

    def bound(self, model: nn.Module, loss: float) -> float:
        """An upper bound of the expected loss, from the training loss under noise, at the γ that makes it least.

        It is one if m independent examples were trained on, K is true of the losses, and γ had been fixed before.
        """
        with torch.no_grad():
            whole = float(self.kl(model)) - float(torch.tensor(self.confidence).log())
        return loss + self.K * sqrt(6 * whole / self.examples)

    def _noises(self, model: nn.Module) -> Iterator[tuple[Weighted, Noise]]:
        for name, adapter in get_state(model).adapters.items():
            for factor in _factors(model, name) if adapter.objective is self else ():
                yield from ((factor, t) for t in factor.applied if isinstance(t, Noise))


def _factors(model: nn.Module, name: str) -> list[Weighted]:
    """The trained factors of an adapter. Raises `AdapterError` for one whose tensors take no noise."""
    found: dict[Any, None] = {}
    for site, chain in chains(model, name).items():
        for factor in chain.factors:
            trained = any(True for _ in factor.parameters())
            if trained and (not isinstance(factor, Weighted) or isinstance(chain, Stack)):
                raise AdapterError(
                    f"{type(factor).__name__} of adapter {name!r} at {site.weight} ({site.role}) takes no noise, because it "
                    f"keeps several matrices. Leave such sites out of the adapter that PAC is attached to."
                )
            if trained:
                found[factor] = None
    return list(found)


def _relower(model: nn.Module, adapters: tuple[str, ...]) -> None:
    for owner in owners(model, adapters).values():
        relower(owner)


def _redraw(model: nn.Module, inputs: Any) -> None:
    """One draw for each forward pass of the whole model: a weight used twice, or recomputed, sees the same noise."""
    state = find_state(model)
    if model.training and state is not None and not state.merged:
        for name in state.active:
            if state.adapters[name].objective is not None:
                for factor in _factors(model, name):
                    for transform in factor.applied:
                        if isinstance(transform, Noise):
                            transform.redraw()
