"""Owners whose code runs as it is: for every call, mode and attribute they compute what W + ΔW in the weight's place would.

The oracle is the same module without adapters, with W + ΔW written into its weight.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from checks import delta, outputs, randomize
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import graphpeft as gp
from graphpeft.errors import AdapterError
from graphpeft.ir.weights import get_parameter
from graphpeft.rewrite.delta import add_delta, update
from graphpeft.rewrite.state import chains

CLOSE = 2e-5
"""float32: sums of a few dozen products, in another order."""


class Owner(nn.Module):
    """Code with the branches that a symbolic trace would burn in."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * width, width) * 0.3)
        self.bias = nn.Parameter(torch.randn(3 * width) * 0.1)
        self.default = nn.Parameter(torch.randn(width))
        self.out = nn.Linear(width, width)
        self.use: str = "linear"
        self.factor: float = 1.0
        self.recompute: bool | None = None

    def project(self, x: Tensor) -> Tensor:
        w, b = self.weight, self.bias
        if self.use == "linear":
            return F.linear(x, w, b)
        if self.use == "keywords":
            return F.linear(input=x, weight=w, bias=b)
        if self.use == "matmul":
            return x @ w.t() + b
        if self.use == "T":
            return torch.matmul(x, w.T) + b
        if self.use == "addmm":
            return torch.addmm(b, x.flatten(0, 1), w.transpose(0, 1)).unflatten(0, x.shape[:2])
        if self.use == "einsum":
            return torch.einsum("bti,oi->bto", x, w) + b
        if self.use == "chunks":
            return torch.cat([F.linear(x, part, c) for part, c in zip(w.chunk(3), b.chunk(3), strict=True)], -1)
        if self.use == "cast":
            return F.linear(x.double(), w.double(), b.double()).to(x.dtype)
        if self.use == "written":
            w.mul_(0.5)
            return F.linear(x, w, b)
        assert self.use == "asked"
        assert isinstance(w, Tensor)
        assert w.shape == (len(b), x.shape[-1])
        assert w.dtype == x.dtype
        assert w.dim() == 2
        assert w.device == x.device
        return F.linear(x, w, b)

    def forward(self, x: Tensor, shift: Tensor | float | None = None) -> Tensor:
        again = self.recompute
        made = self.project(x) if again is None else checkpoint(self.project, x, use_reentrant=again)
        q, k, v = made.chunk(3, -1)
        if shift is None:
            q = q + self.default
        elif isinstance(shift, Tensor):
            q = q * shift
        dropped = 0.5 if self.training else 0.0
        return self.out(F.scaled_dot_product_attention(q, k, v, dropout_p=dropped)) * self.factor


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm = Owner(), nn.LayerNorm(16)

    def forward(self, x: Tensor, shift: Any = None) -> Tensor:
        return x + self.attn(self.norm(x), shift)


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


def dense(model: nn.Module) -> nn.Module:
    """The model without adapters, with W + ΔW in its weights."""
    plain = copy.deepcopy(model)
    gp.remove(plain)
    with torch.no_grad():
        for name in model._graphpeft.active:  # type: ignore[union-attr, operator]
            for site, chain in chains(model, name).items():
                weight = get_parameter(plain, site.weight)
                with chain.settled():
                    weight.copy_(add_delta(weight, site, update(chain, weight, site)))
    return plain


def adapted(rules: str = "qv:lora(r=2)", fill: bool = True) -> Block:
    torch.manual_seed(0)
    model = gp.apply(Block().eval(), rules, inputs=(X,))
    if fill:
        randomize(model)
    return model


CALLS: list[tuple[Any, ...]] = [(X,), (X, None), (X, 2.0), (X, torch.tensor(0.5))]
METHODS = ["lora(r=2)", "dora(r=2)", "rlora", "vera(r=4)", "olora(r=2)", "melora(n=2, r=1)", "blora(r=2)"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("use", ["linear", "chunks"])
def test_every_call_is_that_of_the_dense_weight(method: str, use: str) -> None:
    model = adapted(f"qv:{method}")
    model.attn.use = use
    plain = dense(model)
    for call in CALLS:
        found, base = model(*call), plain(*call)
        assert delta([found], [base]) < CLOSE
        with gp.disabled(model):
            assert delta([found], [model(*call)]) > 1e-2


@pytest.mark.parametrize("use", ["keywords", "matmul", "T", "addmm", "einsum", "chunks", "cast", "asked"])
def test_every_use_of_the_weight(use: str) -> None:
    model = adapted("qv:lora(r=2); o:lora(r=2)")
    model.attn.use = use
    plain = dense(model)
    assert delta([model(X)], [plain(X)]) < CLOSE
    x, same_x = (X.clone().requires_grad_() for _ in range(2))
    model(x).square().sum().backward()
    plain(same_x).square().sum().backward()
    assert delta([x.grad], [same_x.grad]) < 1e-3  # a sum of squares of some dozens
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_a_fresh_adapter_moves_nothing() -> None:
    torch.manual_seed(0)
    base = [Block().eval()(*call) for call in CALLS[:1]]
    torch.manual_seed(0)
    assert torch.equal(adapted(fill=False)(*CALLS[0]), base[0])


@pytest.mark.parametrize("mode", [True, False])
def test_the_mode_is_not_burnt_in(mode: bool) -> None:
    torch.manual_seed(0)
    model = gp.apply(Block().train(mode), "qv:lora(r=2)", inputs=(X,))
    model.eval()
    assert torch.equal(model(X), model(X))
    model.train()
    assert delta([model(X)], [model(X)]) > 1e-2


def test_an_attribute_that_changes_later_acts() -> None:
    model = adapted()
    before = model(X) - X
    model.attn.factor = 3.0
    assert delta([model(X) - X], [3 * before]) < CLOSE


def test_dropout_acts_beside_a_product_and_is_refused_elsewhere() -> None:
    model = adapted("qv:lora(r=2, dropout=0.5)")
    model.attn.default.data.zero_()
    evaluated = model(X)
    assert delta([evaluated], [dense(model)(X)]) < CLOSE
    model.attn.train()
    q = model.attn.project
    assert delta([q(X)], [q(X)]) > 1e-3, "the adapter's own dropout"
    model.attn.use = "einsum"
    with pytest.raises(AdapterError, match=r"'default' drops features of its input at attn\.weight"):
        q(X)
    model.attn.eval()
    assert delta([model(X)], [evaluated]) < CLOSE


def test_code_that_writes_into_an_adapted_weight_is_refused() -> None:
    model = adapted()
    base = model.attn._parameters["weight"].detach().clone()  # type: ignore[union-attr]
    model.attn.use = "written"
    with torch.no_grad(), pytest.raises(AdapterError, match=r"writes into attn\.weight with `mul_`"):
        model(X)
    assert torch.equal(model.attn._parameters["weight"], base)  # type: ignore[arg-type]
    with torch.no_grad(), gp.disabled(model):
        model(X)
    assert torch.equal(model.attn._parameters["weight"], base * 0.5)  # type: ignore[arg-type]


# -- what other tools do with an owner --------------------------------------------------------------------------------


def loaded(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)  # type: ignore[no-any-return]


TOOLS: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "deepcopy": copy.deepcopy,
    "pickle": loaded,
    "export": lambda m: torch.export.export(m, (X,), strict=False).module(),
    "export strictly": lambda m: torch.export.export(m, (X,), strict=True).module(),
    "make_fx": lambda m: make_fx(lambda x: m(x), pre_dispatch=True)(X),
    "make_fx with fakes": lambda m: make_fx(lambda x: m(x), tracing_mode="fake", _allow_non_fake_inputs=True)(X),
    "jit.trace": lambda m: torch.jit.trace(m, (X,), check_trace=False),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("method", ["lora(r=2)", "dora(r=2)"])
@pytest.mark.filterwarnings("ignore")
def test_tools_see_the_adapter(tool: str, method: str) -> None:
    model = adapted(f"qv:{method}")
    assert delta([TOOLS[tool](model)(X)], [model(X)]) < CLOSE


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_without_a_break(backend: str) -> None:
    torch._dynamo.reset()
    model = adapted()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert delta([compiled(X)], [model(X)]) < CLOSE
    assert delta([compiled(X, 2.0)], [model(X, 2.0)]) < CLOSE
    gp.activate(model, {"default": 0.25})
    assert delta([compiled(X)], [dense(model)(X)]) < CLOSE
    torch._dynamo.reset()


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_of_recomputed_passes(inside: bool, reentrant: bool) -> None:
    def gradients(recompute: bool) -> list[Tensor]:
        model = adapted()
        x = X.clone().requires_grad_()
        if recompute and inside:
            model.attn.recompute = reentrant
        y = checkpoint(model, x, use_reentrant=reentrant) if recompute and not inside else model(x)
        y.square().sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]  # type: ignore[misc]

    expected = gradients(recompute=False)
    assert all(g.any() for g in expected)
    assert delta(gradients(recompute=True), expected) < 1e-6  # the same kernels


def test_autocast_computes_both_in_half_precision() -> None:
    model = adapted()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.attn.project(X).dtype == torch.bfloat16
        assert delta([model(X)], [dense(model)(X)]) < 0.1  # bfloat16 has 8 bits


# -- real models -------------------------------------------------------------------------------------------------------


def beit() -> tuple[nn.Module, dict[str, Any]]:
    config = tf.BeitConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8,
        num_labels=3, attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.1,
    )  # fmt: skip
    return tf.BeitForImageClassification(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


def phimoe() -> tuple[nn.Module, dict[str, Any]]:
    config = tf.PhimoeConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.1, input_jitter_noise=0.1,
    )  # fmt: skip
    return tf.PhimoeForCausalLM(config), {"input_ids": torch.randint(3, 97, (2, 7)), "use_cache": False}


def falcon() -> tuple[nn.Module, dict[str, Any]]:
    config = tf.FalconConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout=0.1,
        attention_dropout=0.1,
    )
    return tf.FalconForCausalLM(config), {"input_ids": torch.randint(3, 97, (2, 7)), "use_cache": False}


@pytest.mark.parametrize("make", [beit, phimoe, falcon])
@pytest.mark.parametrize("train", [True, False])
def test_models_are_those_of_the_dense_weights_in_both_modes(make: Callable[[], Any], train: bool) -> None:
    torch.manual_seed(0)
    model, call = make()
    gp.apply(model.train(train), "linear+router:lora(r=2)" if make is phimoe else "linear:lora(r=2)")
    randomize(model, std=0.05)
    plain = dense(model.eval())
    assert delta(outputs(model, ((), call)), outputs(plain, ((), call))) < 1e-4  # two layers of float32
    model.train()
    with torch.no_grad():
        one, other = (next(iter(model(**call).values())) for _ in range(2))
    assert delta([one], [other]) > 1e-4, "dropout is alive"


# -- one weight in two uses, and what code does with a weight besides ---------------------------------------------------


class Tied(nn.Module):
    """A table that is also the head, in one owner."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.randn(16, 8)), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.inner(F.embedding(ids, self.weight))), self.weight)


@pytest.mark.parametrize("method", ["lora(r=2)", "dora(r=2)", "vera(r=2)"])
def test_a_table_that_is_the_head_is_adapted_once(method: str) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 16, (2, 5))
    model = gp.apply(Tied(), f"embed:{method}", inputs=(ids,))
    randomize(model)
    assert delta([model(ids)], [dense(model)(ids)]) < 1e-4  # products of numbers around ten
    gp.verify(model, (ids,))


def test_code_that_casts_a_weight_up_keeps_its_precision() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 5) * 0.3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(input=x, weight=self.weight.to(x.dtype)) * getattr(self.weight, "gain", 1.0)

    model = nn.Sequential(Router())
    model[0].weight.gain = 3.0
    gp.apply(model, "path(*):lora(r=2)", inputs=torch.randn(3, 5))
    model.half()
    x = torch.full((3, 5), 1e6)
    fresh = model(x)
    with gp.disabled(model):
        assert torch.equal(fresh, model(x))
    randomize(model)
    assert delta([model(x) / 1e6], [dense(model)(x) / 1e6 * 3.0]) < 1e-2  # the dense weight was rounded to float16


def test_modes_of_an_exported_graph_and_its_adapters_follow_each_other() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.d, self.b = nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.d(torch.relu(self.a(x))))

    model: Any = torch.export.export(Dropping().train(), (X,)).module()
    for name in "ab":
        gp.apply(model, "path(*):lora(r=2)", name=name)
    for mode, name in ((False, "b"), (False, "a"), (True, "b"), (False, "a"), (True, "a"), (False, "b")):
        model.train(mode)
        gp.activate(model, name)
        assert torch.equal(model(X), model(X)) is not mode
    with gp.disabled(model):
        model.train()
    assert not torch.equal(model(X), model(X))


def test_a_mode_that_is_set_while_merged_reaches_the_adapter() -> None:
    model = adapted("qv:lora(r=2, dropout=0.5)")
    for mode in (True, False):
        gp.merge(model)
        model.train(mode)
        gp.unmerge(model)
        assert all(m.training is mode for m in model.modules())


def test_contexts_in_per_row_leave_its_rows() -> None:
    model = adapted()
    gp.apply(model, "qv:lora(r=2)", name="b", inputs=(X,))
    randomize(model, "b", seed=3)
    alone = {}
    for name in ("default", "b"):
        gp.activate(model, name)
        alone[name] = model(X)
    with gp.per_row(model, ["b", "default"], inputs=(X,)):
        expected = model(X)
        with gp.reference(model), gp.disabled(model):
            model(X)
        assert torch.equal(model(X), expected)
    assert delta([expected], [torch.stack([alone["b"][0], alone["default"][1]])]) < CLOSE


def test_what_trains_is_set_by_activate_and_kept_by_contexts() -> None:
    model = adapted()
    mine = [p for n, p in model.named_parameters() if "adapters" in n]
    model.requires_grad_(False)
    gp.activate(model, "default")
    assert all(p.requires_grad for p in mine)
    mine[0].requires_grad_(False)
    with gp.reference(model):
        model(X)
    assert [p.requires_grad for p in mine] == [False, *(True for _ in mine[1:])]
