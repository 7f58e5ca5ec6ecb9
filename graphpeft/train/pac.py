"""PAC-Bayes regularization of any adapter: Gaussian noise on the trained tensors, and their KL divergence from a prior.

    loss(θ + σ ε) + (KL + c) / (m γ) + 3/2 K² γ

(PAC-tuning: Liu et al., EMNLP 2023, arXiv:2310.17588; RLoRA's regularizer is assumed to derive from it). The prior of
each tensor is centered on its initial value. Evaluation, merging, saving and export use the mean θ.

The noise is a transform on each trained factor: the factor computes with θ + σ ε in place of θ, and nothing else changes.
A forward pre-hook on the root model draws ε once per training forward pass, so every use of a weight in that pass,
including recomputation under gradient checkpointing, sees the same noise. `penalty` adds the KL to the loss.
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
from graphpeft.compat.hooks import has_pre_hook, remove_pre_hook
from graphpeft.compat.sharded import gathered, refuse_sharded
from graphpeft.errors import AdapterError, RuleError
from graphpeft.rewrite.state import branches, find_state, get_state, names, refuse_merged
from graphpeft.rewrite.sync import sync
from graphpeft.train.penalty import objectives
from graphpeft.train.tensors import trained, weighted


@dataclass
class PAC:
    """The objective and its settings. `attach` it after `gp.apply` and before you create the optimizer.

    A `gamma` of about 10² to 10⁴ acts as a temperature: the bound holds, but is uninformative. `gamma="optimal"` is the
    minimizer √(2 (KL + c) / (3 m)) / K; with few examples it pulls an adapter back to its initial value. `sigma` is the
    noise's initial standard deviation, for all tensors, because zero-initialized ones have no scale to derive it from.

    Each tensor, and each matrix of stacked experts, has a prior with its own variance λ². With `prior="closed"` λ
    minimizes the KL; with "trained", as in PAC-tuning, log λ is a parameter that starts there. Adapter files contain
    neither λ nor σ.
    """

    examples: int
    """m, the number of training examples."""
    gamma: float | Literal["optimal"] = 1000.0
    K: float = 1.0
    """The spread of the losses: E exp(γ (mean − loss)) ≤ exp(3/2 K² γ²). See `graphpeft.train.estimate_K`."""
    sigma: float = 0.03
    confidence: float = 0.05
    """The probability with which the bound may fail; c = ln(1 / confidence)."""
    prior: Literal["closed", "trained"] = "closed"
    seed: int = 0
    """Seed of the noise, used if `step` is set."""
    frozen: bool = False
    """The second stage: σ is fixed, the noise stays, and the KL is dropped."""
    step: int | None = None
    """If `None`, each training forward pass draws new noise. Otherwise the noise is a function of `(seed, step)`: set it
    before each optimizer step so that all micro-batches and processes see the same noise, as `AdapterCallback` does."""

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
        """Put noise on every trained tensor of the adapter (by default of all active ones); returns itself.

        Raises `AdapterError`, and changes nothing, if an adapter already has a PAC objective or trains a tensor that is not
        a factor's weight, or if the model is merged.
        """
        refuse_merged(model, "attach noise")
        refuse_sharded(model, "attach noise", "Attach it before fully_shard or accelerator.prepare.")
        state = get_state(model)
        chosen = state.active if name is None else names(model, name)
        factors = {factor: stacked for each in chosen for factor, stacked in trained(model, each).items()}
        for each in chosen:
            if state.adapters[each].objective is not None:
                raise AdapterError(f"Adapter {each!r} already has a PAC objective. Call its detach(model) first.")
        for factor, stacked in factors.items():
            noise = Noise(factor.weight, self.sigma, trained_prior=self.prior == "trained", stacked=stacked)
            factor.with_transforms(noise.train(factor.training).requires_grad_(factor.weight.requires_grad))
        for each in chosen:
            state.adapters[each].objective = self
        if not has_pre_hook(model, _redraw):
            model.register_forward_pre_hook(_redraw)
        sync(model)
        return self

    def detach(self, model: nn.Module) -> None:
        """Remove the noise; the trained means stay."""
        state = get_state(model)
        for factor in dict.fromkeys(factor for factor, _ in self._noises(model)):
            kept = [t for t in factor.applied if not isinstance(t, Noise)]
            del factor.transforms
            if kept:
                factor.with_transforms(*kept)
        mine = tuple(n for n, adapter in state.adapters.items() if adapter.objective is self)
        for name in mine:
            state.adapters[name].objective = None
        sync(model)
        if not any(adapter.objective for adapter in state.adapters.values()):
            remove_pre_hook(model, _redraw)

    def freeze(self, model: nn.Module) -> None:
        """Start the second stage: σ is fixed, the noise stays, and the KL is dropped. Calling it again has no effect.

        From then on σ is unused, so DistributedDataParallel needs `find_unused_parameters=True`, Trainer's default.
        """
        self.frozen = True
        for _, noise in self._noises(model):
            noise.requires_grad_(False)

    def redraw(self, model: nn.Module) -> None:
        """Draw new noise, or the noise of `step`; the model calls this in every training forward pass."""
        for place, (_, noise) in enumerate(self._noises(model)):
            stream = ("noise", str(self.step), str(place))
            noise.redraw(None if self.step is None else int(generator(self.seed, *stream).randint(2**31)))

    def kl(self, model: nn.Module) -> Tensor:
        """KL(posterior ‖ prior) over all tensors, a scalar."""
        mine = (name for name, adapter in get_state(model).adapters.items() if adapter.objective is self)
        with gathered(model, branches(model, *mine)):
            return torch.stack([noise.kl(factor.weight) for factor, noise in self._noises(model)]).sum()

    def penalty(self, model: nn.Module) -> Tensor:
        """The bound's terms beside the training loss; zero in the second stage."""
        kl = self.kl(model)
        if self.frozen:
            return torch.zeros_like(kl)
        whole = kl - torch.tensor(self.confidence).log().to(kl)
        if self.gamma == "optimal":
            gamma = whole.detach().mul(2 / (3 * self.examples)).sqrt() / self.K
            return whole / (self.examples * gamma) + 1.5 * self.K**2 * gamma
        return whole / (self.examples * self.gamma) + 1.5 * self.K**2 * self.gamma

    def bound(self, model: nn.Module, loss: float) -> float:
        """An upper bound of the expected loss, from the training loss under noise, at the γ that minimizes it.

        It is valid if the m training examples are independent, K holds for the losses, and γ was fixed in advance.
        """
        with torch.no_grad():
            whole = float(self.kl(model)) - float(torch.tensor(self.confidence).log())
        return loss + self.K * sqrt(6 * whole / self.examples)

    def _noises(self, model: nn.Module) -> Iterator[tuple[Weighted, Noise]]:
        mine = [name for name, adapter in get_state(model).adapters.items() if adapter.objective is self]
        for factor in dict.fromkeys(factor for name in mine for factor in weighted(model, name)):
            yield from ((factor, t) for t in factor.applied if isinstance(t, Noise))


def _redraw(model: nn.Module, inputs: Any) -> None:
    """Draw noise once per forward pass of the whole model, so that a weight used twice, or recomputed, sees the same."""
    state = find_state(model)
    if model.training and state is not None and not state.merged:
        for objective in objectives(model).values():
            objective.redraw(model)
