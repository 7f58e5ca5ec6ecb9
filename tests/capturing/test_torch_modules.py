"""torch's own attention and encoder modules, which read packed weights past their layers, and modules in their style.

A weight here has rows by slices of a packed parameter, and its module may skip the layer that holds it: an adapter
must act all the same, also on torch's fused path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import Snapshot, adapters, delta, outputs, randomize, same
from torch import Tensor, nn
from torch.nn import functional as F

import graphpeft as gp
from graphpeft.rewrite.state import chains

X, MEMORY = (torch.randn(2, n, 32, generator=torch.Generator().manual_seed(n)) for n in (5, 7))
THIRDS = {"q": ((0, 32),), "k": ((32, 64),), "v": ((64, 96),)}
Call = tuple[tuple[Any, ...], dict[str, Any]]


class Attending(nn.Module):
    """One packed attention between a residual, over `memory` or over x itself."""

    def __init__(self, cross: bool, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True, **options)
        self.cross = cross

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        over = memory if self.cross else x
        return x + self.attn(x, over, over, need_weights=False)[0]


def found(model: nn.Module, *inputs: Tensor) -> set[tuple[str, str, Any]]:
    return {(s.role.upper() if s.cross else s.role, s.weight, s.rows) for s in gp.sites(model, inputs)}


def packed(name: str, cross: bool = False) -> set[tuple[str, str, Any]]:
    roles = {(r, f"{name}.in_proj_weight", rows) for r, rows in THIRDS.items()} | {
        ("o", f"{name}.out_proj.weight", None)
    }
    return {(r.upper() if cross else r, weight, rows) for r, weight, rows in roles}


def life(model: nn.Module, rules: str, inputs: tuple[Tensor, ...]) -> None:
    """A fresh adapter changes no bit; then it moves the output, merges, un-merges to the bit and comes off."""
    model.requires_grad_(False)
    before, base = Snapshot.of(model), outputs(model, (inputs, {}))
    gp.apply(model, rules, inputs=inputs)
    assert same(outputs(model, (inputs, {})), base)
    randomize(model)
    adapted = outputs(model, (inputs, {}))
    assert delta(adapted, base) > 1e-2
    gp.merge(model)
    # float32: one rounding per weight, carried through two layers
    assert delta(outputs(model, (inputs, {})), adapted) < 1e-5 * max(1.0, *(float(t.abs().max()) for t in adapted))
    gp.unmerge(model)
    assert same(outputs(model, (inputs, {})), adapted)
    gp.remove(model)
    before.check(model)


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_packed_attention(cross: bool) -> None:
    model = Attending(cross).eval()
    assert found(model, X, MEMORY) == packed("attn", cross)
    life(model, "qkvo:lora(r=4)", (X, MEMORY))


@pytest.mark.parametrize("role", ["q", "k", "v"])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_one_part_of_a_packed_weight(role: str, cross: bool) -> None:
    """The effective weight differs from the base in these rows alone, by B A."""
    model = Attending(cross).eval()
    base = model.attn.in_proj_weight.detach().clone()
    gp.apply(model, f"{role}:lora(r=4, alpha=4)", inputs=(X, MEMORY), expect=1)
    randomize(model)
    ((site, chain),) = chains(model, "default").items()
    ((start, stop),) = THIRDS[role]
    gp.merge(model)
    moved = model.attn.in_proj_weight - base
    assert (site.full, site.shape, site.form) == (96, (32, 32), "weight")
    B, A = list(chain.parameters())
    assert torch.allclose(moved[start:stop], B @ A, atol=1e-5)  # float32, in another order
    moved[start:stop] = 0
    assert not moved.any()


def test_separate_projections_of_keys_of_another_width() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(32, 4, batch_first=True, kdim=24, vdim=16)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return x + self.attn(x, memory[..., :24], memory[..., :16], need_weights=False)[0]

    model = Wide().eval()
    assert found(model, X, MEMORY) == {
        *((r.upper(), f"attn.{r}_proj_weight", None) for r in "qkv"), ("O", "attn.out_proj.weight", None)
    }  # fmt: skip
    life(model, "qkvo:lora(r=4)", (X, MEMORY))


@pytest.mark.parametrize("norm_first", [False, True], ids=["norm last", "norm first"])
def test_a_decoder_has_self_and_cross_attention(norm_first: bool) -> None:
    layer = nn.TransformerDecoderLayer(32, 4, 48, batch_first=True, norm_first=norm_first)
    model = nn.TransformerDecoder(layer, 2).eval()
    wanted: set[tuple[str, str, Any]] = set()
    for i in range(2):
        wanted |= packed(f"layers.{i}.self_attn") | packed(f"layers.{i}.multihead_attn", cross=True)
        wanted |= {("up", f"layers.{i}.linear1.weight", None), ("down", f"layers.{i}.linear2.weight", None)}
    assert found(model, X, MEMORY) == wanted
    life(model, "q[cross]:lora(r=4); v[self]:lora(r=4); mlp:lora(r=4)", (X, MEMORY))


def test_a_transformer_of_both() -> None:
    model = nn.Transformer(32, 4, 1, 1, 48, batch_first=True).eval()
    names = {"encoder.layers.0.self_attn": False, "decoder.layers.0.self_attn": False}
    wanted = set().union(*(packed(n) for n in names), packed("decoder.layers.0.multihead_attn", cross=True))
    wanted |= {(r, f"{side}.layers.0.linear{i}.weight", None)
               for side in ("encoder", "decoder") for i, r in ((1, "up"), (2, "down"))}  # fmt: skip
    assert found(model, MEMORY, X) == wanted


@pytest.mark.parametrize("rules", ["qv:lora(r=4)", "o:lora(r=4)", "up:lora(r=4)", "down:lora(r=4)"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["norm last", "norm first"])
def test_the_fused_path_of_an_encoder_is_adapted(rules: str, norm_first: bool) -> None:
    """In eval mode without gradients torch runs a layer as one kernel, and with a mask packs the rows that it keeps."""
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    example: Call = ((X,), {"src_key_padding_mask": mask})
    kept = (~mask)[..., None]
    base = [t * kept for t in outputs(model, example)]
    gp.apply(model, rules, inputs=(X,))
    randomize(model)
    fused = [t * kept for t in outputs(model, example)]
    with torch.enable_grad():
        plain = [model(X, src_key_padding_mask=mask).detach() * kept]
    assert delta(fused, base) > 1e-2
    # float32; another kernel sums in another order
    assert delta(fused, plain) < 1e-5
    gp.merge(model)
    assert delta([t * kept for t in outputs(model, example)], fused) < 1e-5


# Modules that spell the projections themselves


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (4, 8)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(-2)


class Weights(nn.Module):
    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / 6))


class Written(Weights):
    """A block over bare parameters, as `use` combines them."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__(**shapes)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return x + self.use(self, x)


def functional(m: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(F.linear(x, w)) for w in (m.q, m.k, m.v))
    return F.linear(joined(F.scaled_dot_product_attention(q, k, v)), m.o)


def with_einsum(m: Any, x: Tensor) -> Tensor:
    q, k, v = (torch.einsum("bsd,dhk->bshk", x, w) for w in (m.q, m.k, m.v))
    p = torch.softmax(torch.einsum("bqhk,bshk->bhqs", q, k), -1)
    return torch.einsum("bshk,hkd->bsd", torch.einsum("bhqs,bshk->bqhk", p, v), m.o)


def weight_left(m: Any, x: Tensor) -> Tensor:
    """Features before positions, as in code that was written for columns."""
    q, k, v = (w @ x.mT for w in (m.q, m.k, m.v))
    return (m.o @ (v @ torch.softmax(q.mT @ k / 6, -1).mT)).mT


def packed_rows(m: Any, x: Tensor) -> Tensor:
    """Queries by a slice and keys and values by another, as the cross attention of torch does."""
    q, (k, v) = F.linear(x, m.qkv[:32]), F.linear(x, m.qkv[32:]).chunk(2, -1)
    return F.scaled_dot_product_attention(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(-2) @ m.o


def filled_in(m: Any, x: Tensor) -> Tensor:
    """Keys of two parts, written into an empty tensor, as in DeepSeek's code."""
    q, (near, v) = heads(F.linear(x, m.q)), F.linear(x, m.kv).split((16, 32), -1)
    k = q.new_empty(2, 4, 5, 8)
    k[..., :4] = near.unflatten(-1, (4, 4)).transpose(1, 2)
    k[..., 4:] = F.linear(x, m.rope).unflatten(-1, (1, 4)).transpose(1, 2)
    return F.linear(joined(F.scaled_dot_product_attention(q, k, heads(v))), m.o)


def relative(m: Any, x: Tensor) -> Tensor:
    """Transformer-XL: a second score with projected positions, which are no keys."""
    q, k, v = (heads(F.linear(x, w)) for w in (m.q, m.k, m.v))
    places = torch.sin(x.new_ones(5, 32).cumsum(0) * x.new_ones(5, 32).cumsum(1))
    r = F.linear(places, m.r).unflatten(-1, (4, 8)).transpose(0, 1)
    p = torch.softmax((q @ k.mT + q @ r.mT) / 3, -1)
    return F.linear(joined(p @ v), m.o)


def pooled(m: Any, x: Tensor) -> Tensor:
    """A learned query over all positions."""
    k, v = F.linear(x, m.k), F.linear(x, m.v)
    return F.linear(torch.softmax(m.probe @ k.mT, -1) @ v, m.o)


def bottleneck(m: Any, x: Tensor) -> Tensor:
    """Widen by a pointwise convolution, mix positions per channel, narrow: an activation stands before the mixing."""
    y = F.relu6(F.conv1d(x.transpose(1, 2), m.wide))
    return F.conv1d(F.relu6(F.conv1d(y, m.deep, padding=1, groups=64)), m.narrow).transpose(1, 2)


SQUARE = dict.fromkeys("qkvo", (32, 32))
WRITTEN: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "functional": (functional, SQUARE, dict.fromkeys("qkvo")),
    "einsum": (with_einsum, dict(q=(32, 4, 8), k=(32, 4, 8), v=(32, 4, 8), o=(4, 8, 32)), dict.fromkeys("qkvo")),
    "weight left": (weight_left, SQUARE, dict.fromkeys("qkvo")),
    "packed rows": (packed_rows, dict(qkv=(96, 32), o=(32, 32)), {
        f"{r} of qkv": rows for r, rows in THIRDS.items()} | {"o": None}),
    "filled in": (filled_in, dict(q=(32, 32), kv=(48, 32), rope=(4, 32), o=(32, 32)), {
        "q": None, "k of kv": ((0, 16),), "v of kv": ((16, 48),), "k of rope": None, "o": None}),
    "relative": (relative, SQUARE | dict(r=(32, 32)), dict.fromkeys("qkvo")),
    "pooled": (pooled, dict(k=(32, 32), v=(32, 32), o=(32, 32), probe=(1, 32)), {
        "K": None, "V": None, "O": None, "other of probe": None}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_projections_written_by_hand(name: str) -> None:
    use, shapes, told = WRITTEN[name]
    model = Written(use, **shapes).eval()
    wanted = {(text.split()[0], text.split()[-1] if " of " in text else text.lower(), r) for text, r in told.items()}
    assert found(model, X) == wanted
    life(model, "attn:lora(r=4)", (X,))


def test_an_inverted_bottleneck_written_by_hand_is_no_mlp() -> None:
    shapes = dict(wide=(64, 32, 1), deep=(64, 1, 3), narrow=(32, 64, 1))
    assert found(Written(bottleneck, **shapes).eval(), X) == {("conv", name, None) for name in shapes}


def test_an_adapter_of_one_spelling_counts_what_its_rows_need() -> None:
    model = Written(packed_rows, qkv=(96, 32), o=(32, 32)).eval()
    gp.apply(model, "kv:lora(r=4)", inputs=(X,), expect=2)
    assert sorted(tuple(p.shape) for p in adapters(model).values()) == [(4, 32), (4, 32), (32, 4), (32, 4)]


def test_looking_at_a_model_leaves_nothing_on_it() -> None:
    model = Written(lambda m, x: F.linear(x + torch.arange(32.0), m.w), w=(32, 32)).eval()
    before = Snapshot.of(model)
    gp.sites(model, (X,))
    before.check(model)
