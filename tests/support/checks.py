"""What the tests share: zoo models with example calls, random adapters, and snapshots of a model to the bit."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from zoo import BERT, SMALL, VOCAB, ZOO

import graphpeft as gp
from graphpeft.capturing.samples import sample_inputs

__all__ = [
    "BERT",
    "CASES",
    "SMALL",
    "VOCAB",
    "Snapshot",
    "adapters",
    "applied",
    "build",
    "call",
    "delta",
    "outputs",
    "randomize",
    "same",
    "sampled",
]


def sampled(cases: Iterable[Any], *slow: Any) -> list[Any]:
    """A test's parameters, those of them that others are like for `-m slow` alone."""
    listed = list(cases)
    assert set(slow) <= set(listed), "a case that is not there"
    return [pytest.param(case, marks=pytest.mark.slow) if case in slow else case for case in listed]


EAGER_ONLY = {"gemma2", "bloom", "deberta_v2"}
"""transformers has no scaled_dot_product_attention for these."""
NOT_TRANSFORMERS = {"hand_written", "torch_encoder"}
CASES = [
    (name, attn)
    for name in ZOO
    for attn in ("sdpa", "eager")
    if not (attn == "sdpa" and name in EAGER_ONLY) and not (attn == "eager" and name == "torch_encoder")
]
"""Every architecture with every attention implementation it has."""


def build(name: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A zoo model in eval mode; the same weights every time."""
    torch.manual_seed(0)
    model = ZOO[name]("eager" if name in EAGER_ONLY else attn).to(dtype).eval()
    for module in model.modules():
        # Fresh biases are zero and would hide a bias that is dropped or added twice.
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            nn.init.normal_(module.bias, std=0.1)
    return model


def inputs(name: str, model: nn.Module) -> Any:
    """The `inputs=` that the model needs: those that are no transformers models need an example."""
    if name not in NOT_TRANSFORMERS:
        return None
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(2, 7, 32, generator=generator).to(next(model.parameters()).dtype),)


def applied(
    name: str, rules: str, *, attn: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0
) -> nn.Module:
    """`build` and `gp.apply`, for tests of what comes after: made once and copied, for the capture takes most of the time."""
    made = _applied(name, rules, attn, dtype, seed)
    torch.manual_seed(0)  # whether it was made now or earlier
    return copy.deepcopy(made)


@cache
def _applied(name: str, rules: str, attn: str, dtype: torch.dtype, seed: int) -> nn.Module:
    model = build(name, attn, dtype)
    return gp.apply(model, rules, inputs=inputs(name, model), seed=seed)


def call(name: str, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of an example call."""
    given = inputs(name, model)
    if given is not None:
        return given, {}
    dtype = next(model.parameters()).dtype
    return (), {k: v.to(dtype) if v.is_floating_point() else v for k, v in sample_inputs(model).items()}


def floats(output: Any) -> list[Tensor]:
    """Every floating-point tensor in a model's output."""
    plain = dict(output) if hasattr(output, "keys") else output
    return [t for t in tree_leaves(plain) if isinstance(t, Tensor) and t.is_floating_point()]


def outputs(model: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Tensor]:
    args, kwargs = example
    with torch.no_grad():
        found = floats(model(*args, **kwargs))
    assert found
    return found


def same(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    """Equal to the bit."""
    return all(_equal(a, b) for a, b in zip(one, other, strict=True))


def _equal(a: Tensor, b: Tensor) -> bool:
    """Tensors made of others, as torchao's are, by what they are made of."""
    flatten: Any = getattr(a, "__tensor_flatten__", None)
    if flatten is None:
        return torch.equal(a, b)
    return type(a) is type(b) and all(torch.equal(getattr(a, name), getattr(b, name)) for name in flatten()[0])


def delta(one: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    """The largest absolute difference."""
    return max(float((a - b).detach().abs().max()) for a, b in zip(one, other, strict=True))


def adapters(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """An adapter's parameters, known by their names."""
    return {n: p for n, p in model.named_parameters() if f"adapters.{name}." in n}


def randomize(model: nn.Module, name: str = "default", std: float = 0.3, seed: int = 0) -> None:
    """Fill an adapter with random numbers, as training would: a fresh one changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    found = adapters(model, name)
    assert found
    for parameter in found.values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)


@dataclass
class Snapshot:
    """A model to the bit: names, tensors, their identity, classes, flags."""

    tensors: dict[str, Tensor]
    identities: dict[str, int]
    required: dict[str, bool]
    modules: dict[str, type]
    attributes: dict[str, frozenset[str]]
    code: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        named = dict(model.named_parameters(remove_duplicate=False))
        return cls(
            {n: t.detach().clone() for n, t in model.state_dict().items()},
            {n: id(p) for n, p in named.items()},
            {n: p.requires_grad for n, p in named.items()},
            {n: type(m) for n, m in model.named_modules()},
            {n: frozenset(m.__dict__) for n, m in model.named_modules()},
            {n: m.code for n, m in model.named_modules() if isinstance(m, torch.fx.GraphModule)},
        )

    def check(self, model: nn.Module, adapted: bool = False) -> None:
        """Assert that the model is as it was. Classes of adapted modules are generated anew: their names count then."""
        now = Snapshot.of(model)
        assert list(now.tensors) == list(self.tensors)
        assert same(now.tensors.values(), self.tensors.values())
        assert now.identities == self.identities
        assert now.required == self.required
        assert {n: c.__name__ if adapted else c for n, c in now.modules.items()} == {
            n: c.__name__ if adapted else c for n, c in self.modules.items()
        }
        assert now.attributes == self.attributes
        assert now.code == self.code
