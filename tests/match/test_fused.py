"""Some rows of a fused projection: found by asking autograd, adapted alone, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checks import adapters, build, call, outputs, randomize
from torch import Tensor, nn
from torch.nn import functional as F

import graphpeft as gp


def test_two_thirds_of_a_fused_projection() -> None:
    """PEFT can only adapt `c_attn` as a whole; here the keys' columns do not change by a bit."""
    model = build("gpt2")
    example = call("gpt2", model)
    seen: list[torch.Tensor] = []
    first = model.transformer.h[0].attn.c_attn
    gp.apply(model, "qv:lora(r=8)")
    randomize(model)
    first.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    with gp.disabled(model):
        outputs(model, example)
    outputs(model, example)
    base, adapted = seen
    assert torch.equal(adapted[..., 64:128], base[..., 64:128])
    assert (adapted - base)[..., :64].abs().min(-1).values.max() > 0
    assert (adapted - base)[..., 128:].abs().min(-1).values.max() > 0
    site = first.adapters.default.q
    assert tuple(site.factors[1].weight.shape) == (64, 8)  # B makes the queries alone
    assert gp.trainable(model)[0] == 2 * 2 * 8 * (64 + 64)


def test_interleaved_rows_are_adapted_and_nothing_between_them() -> None:
    model = build("gpt_neox")
    example = call("gpt_neox", model)
    seen: list[torch.Tensor] = []
    first = model.gpt_neox.layers[0].attention.query_key_value
    gp.apply(model, "k:lora")
    randomize(model)
    first.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    with gp.disabled(model):
        outputs(model, example)
    outputs(model, example)
    moved = (seen[1] - seen[0]).abs().amax((0, 1)) > 0
    keys = torch.zeros(192, dtype=torch.bool)
    for start in (16, 64, 112, 160):
        keys[start : start + 16] = True
    assert torch.equal(moved, keys)


class Fused(nn.Module):
    """Two heads of four features, made by one projection that `take` cuts into q, k and v."""

    def __init__(self, take: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], width: int = 24) -> None:
        super().__init__()
        self.take = take
        self.fused, self.out = nn.Linear(8, width), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        made = self.fused(x)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.take(made))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


def runs(text: str) -> tuple[tuple[int, int], ...]:
    return tuple((int(a), int(b)) for a, b in (part.split(":") for part in text.split()))


LAYOUTS: dict[str, tuple[Callable[[Tensor], tuple[Tensor, ...]], tuple[str, str, str]]] = {
    "chunk": (lambda y: y.chunk(3, -1), ("0:8", "8:16", "16:24")),
    "split, v first": (lambda y: y.split(8, -1)[::-1], ("16:24", "8:16", "0:8")),
    "slices": (lambda y: (y[..., 4:12], y[..., 12:20], torch.cat([y[..., 20:], y[..., :4]], -1)),
               ("4:12", "12:20", "0:4 20:24")),
    "per head": (lambda y: tuple(t.flatten(-2) for t in y.unflatten(-1, (2, 3, 4)).unbind(-2)),
                 ("0:4 12:16", "4:8 16:20", "8:12 20:24")),
    "interleaved": (lambda y: tuple(y.unflatten(-1, (8, 3)).unbind(-1)), tuple(
        " ".join(f"{i}:{i + 1}" for i in range(start, 24, 3)) for start in range(3))),
    "gathered by a constant": (
        lambda y: tuple(y.index_select(-1, torch.arange(23, -1, -1)).chunk(3, -1)), ("16:24", "8:16", "0:8")),
    "keys shared by values": (lambda y: (y[..., :8], y[..., 8:16], y[..., 8:16]), ("0:8", "8:16", "8:16")),
    "some features unused": (lambda y: (y[..., :8], y[..., 8:16], y[..., 16:20].repeat(1, 1, 2)), ("0:8", "8:16", "16:20")),
    "scaled, biased, rectified": (
        lambda y: (y[..., :8] * 0.5, F.relu(y[..., 8:16] + 1), torch.tanh(y[..., 16:])), ("0:8", "8:16", "16:24")),
}  # fmt: skip


@pytest.mark.parametrize(("take", "rows"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_rows_of_any_layout(
    take: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], rows: tuple[str, str, str]
) -> None:
    model = Fused(take).eval()
    x = torch.randn(2, 5, 8)
    found = {s.role: s.rows for s in gp.sites(model, (x,))}
    assert found == dict(zip("qkv", map(runs, rows), strict=True)) | {"o": None}


def test_queries_that_take_every_feature_have_no_rows() -> None:
    """Mixed across the projection, no row belongs to one role alone: all feed each."""
    model = Fused(lambda y: (y.unflatten(-1, (3, 8)).sum(-2),) * 3).eval()
    found = gp.sites(model, (torch.randn(2, 5, 8),))
    assert [(s.role, s.rows) for s in found if s.role in "qkv"] == [("q", None), ("k", None), ("v", None)]


def test_shared_rows_get_the_sum_of_their_roles() -> None:
    """Keys and values of one slice are one projection with two roles: both adapters act on the slice."""
    model = Fused(lambda y: (y[..., :8], y[..., 8:16], y[..., 8:16])).eval()
    x = torch.randn(2, 5, 8)
    gp.apply(model, "kv:lora(r=2)", inputs=(x,))
    randomize(model)
    chains = model.fused.adapters.default
    with gp.disabled(model):
        base = model.fused(x)
    moved = model.fused(x) - base
    expected = sum((B.weight @ A.weight for _, B, A in (chains.k.factors, chains.v.factors)), torch.zeros(8, 8))
    # float32, products of rank 2
    assert torch.allclose(moved[..., 8:16], x @ expected.T, atol=1e-5)
    assert torch.equal(moved[..., :8], torch.zeros(2, 5, 8))


def test_parameters_are_as_many_as_the_rows_need() -> None:
    model = gp.apply(build("falcon"), "qkv:lora(r=2)")
    shapes = {n.rpartition(".default.")[2]: tuple(p.shape) for n, p in adapters(model).items() if ".h.0." in n}
    assert shapes == {
        "q.factors.1.weight": (64, 2), "q.factors.2.weight": (2, 64), "k.factors.1.weight": (16, 2),
        "k.factors.2.weight": (2, 64), "v.factors.1.weight": (16, 2), "v.factors.2.weight": (2, 64),
    }  # fmt: skip
