"""What other code meets that reads or sets a weight which its own module shows as weight + ΔW: the base, or a refusal."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchao
from checks import adapters, delta, randomize, same
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import graphpeft as gp
from graphpeft.errors import AdapterError
from graphpeft.rewrite.state import chains

X = torch.randn(2, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(4, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean(-1))


def adapted(method: str = "lora(r=2)") -> tuple[Conv, Tensor, Tensor]:
    """A model with a trained adapter on its convolution, its base weight, and ΔW (of a method that does not look at W)."""
    torch.manual_seed(0)
    model = Conv().double().eval()
    base = model.conv.weight.detach().clone()
    gp.apply(model, f"conv:{method}", inputs=(X,))
    randomize(model)
    (chain,) = chains(model, "default").values()
    return model, base, Tensor() if chain.needs_base_weight else chain.delta().detach().reshape(base.shape)


def by_hand(model: Conv, weight: Tensor) -> Tensor:
    """What the model computes with this weight, ΔW included. float64: differences of 1e-12 are roundings."""
    return model.head(F.conv1d(X, weight, model.conv.bias).relu().mean(-1))


def test_the_model_computes_with_the_update_and_everybody_else_meets_the_base() -> None:
    model, base, update = adapted()
    assert delta([model(X)], [by_hand(model, base + update)]) < 1e-12
    assert delta([model(X)], [by_hand(model, base)]) > 1e-3
    assert model.conv.weight is dict(model.named_parameters())["conv.weight"]
    assert torch.equal(model.conv.weight, base)


class Steps(nn.Module):
    """Calls its child, or reads the weight of it in a helper, as Mamba does in a step of decoding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3)

    def forward(self, x: Tensor, step: bool = False) -> Tensor:
        return (step_of(self, x) if step else self.conv(x)).relu()


def step_of(module: Steps, x: Tensor) -> Tensor:
    return F.conv1d(x, module.conv.weight, module.conv.bias)


@pytest.mark.parametrize("call", [Steps.__call__, Steps.forward], ids=["called", "forward"])
def test_a_parent_that_reads_the_weight_of_its_child_computes_too(call: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model = Steps().double()
    gp.apply(model, "head:lora(r=2)", inputs=(X,))
    randomize(model)
    base = F.conv1d(X, model.conv.weight, model.conv.bias).relu()
    assert same([call(model, X, step=True)], [model(X)])
    assert delta([model(X)], [base]) > 1e-3
    # In one graph: compiled code asks for the weight in order to compute, and there is no call stack to look at.
    assert delta([torch.compile(model, backend="eager", fullgraph=True)(X, step=True)], [model(X)]) < 1e-12


class Helpers(nn.Module):
    """Computes with the weight of its child in methods that are not `forward`."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.conv, self.reentrant = nn.Conv1d(4, 8, 3), reentrant

    def features(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.conv.weight, self.conv.bias).relu()

    def __private(self, x: Tensor) -> Tensor:
        return self.features(x)

    def unnamed(*args: Any) -> Tensor:
        self, x = args
        return F.conv1d(x, self.conv.weight, self.conv.bias).relu()

    renamed = lambda self, x: F.conv1d(x, self.conv.weight, self.conv.bias).relu()  # noqa: E731

    @property
    def weight_twice(self) -> Tensor:
        return 2 * self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        found = (
            self.conv(x).relu()
            if self.reentrant is None
            else checkpoint(self.features, x, use_reentrant=self.reentrant)
        )
        return 3 * found

    def tie_weights(self) -> Tensor:
        return self.conv.weight


def helpers(reentrant: bool | None = None) -> Helpers:
    torch.manual_seed(0)
    model = Helpers().double()
    gp.apply(model, "head:lora(r=2)", inputs=(X,))
    randomize(model)
    model.reentrant = reentrant
    return model


def test_methods_of_a_model_compute_also_where_no_forward_runs() -> None:
    model = helpers()
    for method in (model.features, model.unnamed, model.renamed, model._Helpers__private):
        assert delta([3 * method(X)], [model(X)]) < 1e-12
    assert delta([F.conv1d(X, model.weight_twice / 2, model.conv.bias).relu() * 3], [model(X)]) < 1e-12
    with gp.disabled(model):
        assert model.weight_twice.equal(2 * model.conv.weight)
    assert model.tie_weights() is model.conv.weight  # but for those that look after weights
    model.requires_grad_(False)
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: F.conv1d(x, model.conv.weight, model.conv.bias).relu(), X)
    assert delta([3 * traced(X)], [model(X)]) < 1e-12


class Recomputed(torch.autograd.Function):
    """Checkpointing by hand."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor, *weights: Tensor) -> Tensor:
        ctx.run, ctx.weights = run, weights
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        return None, *torch.autograd.grad(y, [x, *ctx.weights], grad)


def test_recomputation_by_hand_computes() -> None:
    model = helpers()
    weights = list(adapters(model).values())

    def features(x: Tensor) -> Tensor:
        return F.conv1d(x, model.conv.weight, model.conv.bias).relu()

    found = []
    for run in (model, lambda x: Recomputed.apply(features, x, *weights) * 3):
        x = X.clone().requires_grad_()
        found.append(torch.autograd.grad(run(x).square().sum(), [x, *weights]))
    assert delta(*found) < 1e-12


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_computes(reentrant: bool) -> None:
    """In backward, where no module is called any more."""
    found = []
    for model in (helpers(), helpers(reentrant)):
        x = X.clone().requires_grad_()
        model(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in adapters(model).values())])
    assert all(grad is not None for grad in found[1])
    assert delta(*found) < 1e-12


def test_fusion_with_a_batch_norm_is_refused() -> None:
    """It scales the weight that it reads, and would add an unscaled ΔW to it."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(conv=nn.Conv1d(4, 8, 3), norm=nn.BatchNorm1d(8))).double().eval()
    gp.apply(model, "path(conv):lora(r=2)", inputs=(X,))
    randomize(model)
    before = model(X)
    with pytest.raises(AdapterError, match=r"conv\.weight is read as weight \+ ΔW, and torch\.nn\.utils\.fusion"):
        fuse_conv_bn_eval(model.conv, model.norm)
    assert same([model(X)], [before])
    gp.merge(model)
    assert delta([fuse_conv_bn_eval(model.conv, model.norm)(X)], [before]) < 1e-12


def test_a_branch_that_fails_is_no_missing_attribute() -> None:
    """Python asks `__getattr__` then, and that has the base weight."""
    model, _, _ = adapted()
    (chain,) = chains(model, "default").values()
    chain.delta = lambda weight=None: None.nothing  # type: ignore[attr-defined,method-assign,union-attr]
    with pytest.raises(RuntimeError, match=r"ΔW of conv\.weight cannot be computed.*nothing"):
        model(X)


@pytest.mark.parametrize("method", ["lora(r=2)", "dora(r=2)"])
def test_functional_call_takes_the_place_of_the_base(method: str) -> None:
    model, base, _ = adapted(method)
    other = torch.randn_like(base)
    before = model(X)
    found = torch.func.functional_call(model, {"conv.weight": other}, (X,))
    again = copy.deepcopy(model)
    with torch.no_grad():
        again.conv._parameters["weight"].copy_(other)
    assert same([found], [again(X)])
    assert same([model(X)], [before])


def test_load_state_dict_assigns_the_base() -> None:
    model, base, update = adapted()
    other = torch.randn_like(base)
    model.load_state_dict({"conv.weight": other}, strict=False, assign=True)
    assert torch.equal(model.conv.weight, other)
    assert delta([model(X)], [by_hand(model, other + update)]) < 1e-12
    gp.remove(model)
    assert delta([model(X)], [by_hand(model, other)]) < 1e-12


def test_pruning_prunes_the_base() -> None:
    model, base, update = adapted()
    prune.l1_unstructured(model.conv, "weight", 0.5)
    assert torch.equal(model.conv.weight_orig, base)
    pruned = base * model.conv.weight_mask
    assert delta([model(X)], [by_hand(model, pruned + update)]) < 1e-12
    for act in (gp.merge, partial(gp.save, folder="nowhere")):  # refused by name, and nothing is changed
        with pytest.raises(AdapterError, match=r"conv\.weight is no parameter of Conv any more.*prune\.remove"):
            act(model)
    assert delta([model(X)], [by_hand(model, pruned + update)]) < 1e-12
    prune.remove(model.conv, "weight")
    assert delta([model(X)], [by_hand(model, pruned + update)]) < 1e-12
    gp.remove(model)
    assert torch.equal(model.conv.weight, pruned)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_weight_norm_by_hooks_takes_the_base_apart() -> None:
    model, base, update = adapted()
    nn.utils.weight_norm(model.conv)
    assert delta([model(X)], [by_hand(model, base + update)]) < 1e-12
    with torch.no_grad():
        model.conv.weight_g.mul_(2)
    assert delta([model(X)], [by_hand(model, 2 * base + update)]) < 1e-12
    nn.utils.remove_weight_norm(model.conv)
    assert delta([model.conv.weight], [2 * base]) < 1e-12


@pytest.mark.parametrize(
    "hide",
    [
        lambda m: parametrizations.weight_norm(m.conv),
        lambda m: parametrizations.orthogonal(m.conv),
        lambda m: parametrize.register_parametrization(m.conv, "weight", nn.Identity()),
    ],
    ids=["weight_norm", "orthogonal", "own"],
)
def test_a_parametrization_would_hide_the_update_and_is_refused(hide: Callable[[Conv], Any]) -> None:
    model, _, _ = adapted()
    before, state, kind = model(X), {k: v.clone() for k, v in model.state_dict().items()}, type(model.conv)
    with pytest.raises(AdapterError, match=r"conv\.weight is read as weight \+ ΔW.*Nothing was changed.*gp\.remove"):
        hide(model)
    assert type(model.conv) is kind
    assert model.state_dict().keys() == state.keys()
    assert same([model(X)], [before])
    gp.remove(model)
    hide(model)


def test_a_quantizer_rounds_the_base() -> None:
    """Fused layers of torch's encoder, which a quantizer takes for plain ones."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    gp.apply(model, "mlp:lora(r=2)", inputs=(TOKENS,))
    randomize(model)
    weights = {n: m.weight.detach().clone() for n, m in model.named_modules() if n in ("linear1", "linear2")}
    by_float = copy.deepcopy(model)
    torchao.quantize_(model, torchao.quantization.Int8WeightOnlyConfig(), lambda _, name: name in weights)
    for name, weight in weights.items():
        rounded = model.get_submodule(name).weight.dequantize()
        # A row in 8 bits: half a step of 1 / 127 of its largest entry.
        assert ((rounded - weight).abs() <= weight.abs().amax(1, keepdim=True) / 127 * 0.51).all()
        with torch.no_grad():
            by_float.get_submodule(name)._parameters["weight"].copy_(rounded)
    assert delta([model(TOKENS)], [by_float(TOKENS)]) < 1e-6


def test_what_is_written_is_kept() -> None:
    model, base, update = adapted()
    with torch.no_grad():
        model.conv.weight.mul_(2)
    assert delta([model(X)], [by_hand(model, 2 * base + update)]) < 1e-12
    model.conv.weight = nn.Parameter(3 * base)
    assert delta([model(X)], [by_hand(model, 3 * base + update)]) < 1e-12
    del model.conv.weight
    assert not hasattr(model.conv, "weight")


def test_an_average_of_models_is_one_of_their_parameters() -> None:
    model, _, _ = adapted()
    assert same([AveragedModel(model)(X)], [model(X)])
