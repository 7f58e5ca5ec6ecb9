"""PAC-Bayes regularization of any adapter: Gaussian noise on what it trains, and the divergence from where it began.

    loss(θ + σ ε) + (KL + c) / (m γ) + 3/2 K² γ

(PAC-tuning: Liu et al., EMNLP 2023, arXiv:2310.17588, from which RLoRA's regularizer is taken to descend). The prior of
each tensor is centered on its initial value. Evaluation, merging, saving and export use the mean θ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graphpeft.chain import Noise, Weighted
from graphpeft.chain.seeds import generator
from graphpeft.compat.sharded import gathered, refuse_sharded
from graphpeft.errors import AdapterError, RuleError
from graphpeft.rewrite.owner import relower
from graphpeft.rewrite.state import branches, find_state, get_state, names, owners, refuse_merged
from graphpeft.train.penalty import objectives
from graphpeft.train.tensors import trained, weighted


@dataclass
class PAC:
    """The objective's numbers. `attach` it after `gp.apply` and before the optimizer is made.

    `gamma` of some 10² to 10⁴ is a temperature: the bound then holds, and says little. With `gamma="optimal"` it is the
    minimizer √(2 (KL + c) / (3 m)) / K, at which few examples pull an adapter back to where it began. `sigma` is the
    noise's initial standard deviation; zero-initialized tensors have no scale of their own to take it from.

    Each tensor, and each matrix of stacked experts, has a prior of its own variance λ². With `prior="closed"` that is the
    one that minimizes the KL; with "trained", as in PAC-tuning, log λ is a parameter that starts there. Neither it nor σ
    belongs to the adapter's file.
    """

    examples: int
    """m, the number of training examples."""
    gamma: float | Literal["optimal"] = 1000.0
    K: float = 1.0
    """How far losses spread: E exp(γ (mean − loss)) ≤ exp(3/2 K² γ²). See `graphpeft.train.estimate_K`."""
    sigma: float = 0.03
    confidence: float = 0.05
    """The probability with which the bound may fail; c = ln(1 / confidence)."""
    prior: Literal["closed", "trained"] = "closed"
    seed: int = 0
    """Of the noise, where `step` is set."""
    frozen: bool = False
    """In the second stage σ is fixed, the noise stays and the KL is dropped."""
    step: int | None = None
    """Without one each forward pass of the model in training draws new noise. With one the noise is a function of
    `(seed, step)`: set it before each optimizer step to give all micro-batches, and all processes, the same.
    `AdapterCallback` does so."""

    def __post_init__(self) -> None:
        gamma = 1.0 if self.gamma == "optimal" else self.gamma
        for name, value in {"examples": self.examples, "gamma": gamma, "K": self.K, "sigma": self.sigma}.items():
            if not value > 0:
                raise RuleError(f"PAC: {name} = {value} is not > 0.")
        if not 0 < self.confidence < 1:
            raise RuleError(f"PAC: confidence = {self.confidence} is not between 0 and 1.")
        if self.prior not in ("closed", "trained"):
            raise RuleError(f"PAC: prior = {self.prior!r} is neither 'closed' nor 'trained'.")

    def attach(self, model: nn.Module, name: str | None = None) -> PAC:
        """Put noise on every trained tensor of the adapter (the active ones without a name); returns itself.

        Raises `AdapterError`, and changes nothing, if an adapter has such an objective already or trains what is not the
        weight of a factor, or if the model is merged.
        """
        refuse_merged(model, "attach noise")
        refuse_sharded(model, "attach noise", "Attach it before fully_shard or accelerator.prepare.")
        state = get_state(model)
        chosen = state.active if name is None else names(model, name)
        factors = {factor: stacked for each in chosen for factor, stacked in trained(model, each).items()}
        for each in chosen:
            if state.adapters[each].objective is not None:
                raise AdapterError(f"Adapter {each!r} has a PAC objective already. Call its detach(model) first.")
        for factor, stacked in factors.items():
            noise = Noise(factor.weight, self.sigma, trained_prior=self.prior == "trained", stacked=stacked)
            factor.with_transforms(noise.train(factor.training).requires_grad_(factor.weight.requires_grad))
        for each in chosen:
            state.adapters[each].objective = self
        if not any(hook is _redraw for hook in model._forward_pre_hooks.values()):
            model.register_forward_pre_hook(_redraw)
        _relower(model, chosen)
        return self

    def detach(self, model: nn.Module) -> None:
        """Take the noise off again; what was trained stays, as the mean."""
        state = get_state(model)
        for factor in dict.fromkeys(factor for factor, _ in self._noises(model)):
            kept = [t for t in factor.applied if not isinstance(t, Noise)]
            del factor.transforms
            if kept:
                factor.with_transforms(*kept)
        mine = tuple(n for n, adapter in state.adapters.items() if adapter.objective is self)
        for name in mine:
            state.adapters[name].objective = None
        _relower(model, mine)
        if not any(adapter.objective for adapter in state.adapters.values()):
            for key in [key for key, hook in model._forward_pre_hooks.items() if hook is _redraw]:
                del model._forward_pre_hooks[key]

    def freeze(self, model: nn.Module) -> None:
        """The second stage: σ is fixed, the noise stays, the KL is dropped. Calling it again changes nothing.

        DistributedDataParallel calls σ unused from then on, and needs `find_unused_parameters=True`, Trainer's default.
        """
        self.frozen = True
        for _, noise in self._noises(model):
            noise.requires_grad_(False)

    def redraw(self, model: nn.Module) -> None:
        """New noise, or that of `step`; the model's forward pass in training calls it."""
        for place, (_, noise) in enumerate(self._noises(model)):
            stream = ("noise", str(self.step), str(place))
            noise.redraw(None if self.step is None else int(generator(self.seed, *stream).randint(2**31)))

    def kl(self, model: nn.Module) -> Tensor:
        """KL(posterior ‖ prior) over all tensors, a scalar."""
        mine = (name for name, adapter in get_state(model).adapters.items() if adapter.objective is self)
        with gathered(model, branches(model, *mine)):
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
        mine = [name for name, adapter in get_state(model).adapters.items() if adapter.objective is self]
        for factor in dict.fromkeys(factor for name in mine for factor in weighted(model, name)):
            yield from ((factor, t) for t in factor.applied if isinstance(t, Noise))


def _relower(model: nn.Module, adapters: tuple[str, ...]) -> None:
    for owner in owners(model, adapters).values():
        relower(owner)


def _redraw(model: nn.Module, inputs: Any) -> None:
    """One draw for each forward pass of the whole model: a weight used twice, or recomputed, sees the same noise."""
    state = find_state(model)
    if model.training and state is not None and not state.merged:
        for objective in objectives(model).values():
            objective.redraw(model)
