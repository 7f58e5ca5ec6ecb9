"""Products of an activation and a parameter, in every spelling: found with the right layout, and adapted there.

Each case is a model of one bare parameter. What was read off the graph is tested by what an adapter does with it: the
output moves as the dense update of the rows says, merging gives the same numbers, and un-merging the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from checks import Snapshot, delta, outputs, randomize, same
from torch import Tensor, fx, nn
from torch.nn import functional as F

import graphpeft as gp
from graphpeft.ir.site import Site
from graphpeft.match.products import read_affine
from graphpeft.rewrite.state import chains

Use = Callable[[Any, Tensor], Tensor]
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Bare(nn.Module):
    """One parameter, used as `use` says."""

    def __init__(self, use: Use, *shape: int) -> None:
        super().__init__()
        self.weight, self.use = nn.Parameter(torch.randn(shape) / 3), use
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


@dataclass
class Read:
    """What a site of the parameter says."""

    matrix: tuple[int, int]
    transposed: bool = False
    stack: int | None = None
    rows: tuple[tuple[int, int], ...] | None = None
    form: str = "weight"


SPELLINGS: dict[str, tuple[Use, tuple[int, ...], Read]] = {
    "linear": (lambda m, x: F.linear(x, m.weight, m.bias), (6, 8), Read((6, 8), form="branch")),
    "x @ w": (lambda m, x: x @ m.weight, (8, 6), Read((6, 8), True, form="branch")),
    "x @ w.T": (lambda m, x: x @ m.weight.T, (6, 8), Read((6, 8), form="branch")),
    "w @ x": (lambda m, x: m.weight @ x.mT, (6, 8), Read((6, 8))),
    "w.T @ x": (lambda m, x: m.weight.T @ x.mT, (8, 6), Read((6, 8), True)),
    "addmm": (lambda m, x: torch.addmm(m.bias, x.flatten(0, 1), m.weight), (8, 6), Read((6, 8), True, form="branch")),
    "bsd,od->bso": (lambda m, x: torch.einsum("bsd,od->bso", x, m.weight), (6, 8), Read((6, 8), form="branch")),
    "bsd,do->bso": (lambda m, x: torch.einsum("bsd,do->bso", x, m.weight), (8, 6), Read((6, 8), True, form="branch")),
    "od,bsd->bos": (lambda m, x: torch.einsum("od,bsd->bos", m.weight, x), (6, 8), Read((6, 8))),
    "...d,od->...o": (lambda m, x: torch.einsum("...d,od->...o", x, m.weight), (6, 8), Read((6, 8), form="branch")),
    "bsd,dhk->bshk": (lambda m, x: torch.einsum("bsd,dhk->bshk", x, m.weight), (8, 2, 3), Read((6, 8), True)),
    "bsd,hkd->bshk": (lambda m, x: torch.einsum("bsd,hkd->bshk", x, m.weight), (2, 3, 8), Read((6, 8))),
    "bshk,hkd->bsd": (
        lambda m, x: torch.einsum("bshk,hkd->bsd", x.unflatten(-1, (2, 4)), m.weight), (2, 4, 6), Read((6, 8), True)),
    "bshk,dhk->bsd": (
        lambda m, x: torch.einsum("bshk,dhk->bsd", x.unflatten(-1, (2, 4)), m.weight), (6, 2, 4), Read((6, 8))),
    "bmm": (lambda m, x: torch.bmm(x, m.weight), (2, 8, 6), Read((6, 8), True, stack=2)),
    "bmm of the transpose": (lambda m, x: torch.bmm(x, m.weight.mT), (2, 6, 8), Read((6, 8), stack=2)),
    "esd,edo->eso": (lambda m, x: torch.einsum("esd,edo->eso", x, m.weight), (2, 8, 6), Read((6, 8), True, stack=2)),
    "one of a stack": (lambda m, x: F.linear(x, m.weight[1]), (3, 6, 8), Read((6, 8), stack=3)),
    "each of a stack": (
        lambda m, x: sum(F.linear(x[:, i], m.weight[i]) for i in range(3)), (3, 6, 8), Read((6, 8), stack=3)),
    "rows in the middle": (lambda m, x: F.linear(x, m.weight[2:5]), (6, 8), Read((3, 8), rows=((2, 5),))),
    "rows split off": (lambda m, x: F.linear(x, m.weight.split([2, 4])[1]), (6, 8), Read((4, 8), rows=((2, 6),))),
    "a chunk": (lambda m, x: F.linear(x, m.weight.chunk(3)[1]), (6, 8), Read((2, 8), rows=((2, 4),))),
    "copied": (lambda m, x: x @ m.weight.clone().contiguous(), (8, 6), Read((6, 8), True, form="branch")),
    "conv1d": (lambda m, x: F.conv1d(x.mT, m.weight, m.bias), (6, 8, 3), Read((6, 24))),
    "conv1d, two groups": (lambda m, x: F.conv1d(x.mT, m.weight, groups=2), (6, 4, 1), Read((6, 4))),
}  # fmt: skip


def bare(name: str) -> tuple[Bare, Site]:
    use, shape, _ = SPELLINGS[name]
    model = Bare(use, *shape).double().eval().requires_grad_(False)  # torch picks its kernel for w @ x by that
    (site,) = gp.sites(model, (X,))
    return model, site


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_layout_is_read_off_the_product(name: str) -> None:
    _, site = bare(name)
    read = SPELLINGS[name][2]
    assert site.weight == "weight"
    assert Read(site.shape, site.transposed, site.stack, site.rows, site.form) == read


@pytest.mark.parametrize("name", SPELLINGS)
def test_an_adapter_is_the_dense_update_of_those_rows(name: str) -> None:
    model, site = bare(name)
    before, base = Snapshot.of(model), outputs(model, ((X,), {}))
    gp.apply(model, "path(weight):lora(r=2, alpha=2)", inputs=(X,), expect=1)
    assert same(outputs(model, ((X,), {})), base)
    randomize(model)
    (branch,) = chains(model, "default").values()
    adapted = outputs(model, ((X,), {}))
    assert delta(adapted, base) > 1e-2

    plain = Bare(SPELLINGS[name][0], *SPELLINGS[name][1]).double()
    plain.load_state_dict(before.tensors)
    B, A = list(branch.parameters())
    whole = torch.zeros(*B.shape[:-2], site.full, site.inputs, dtype=torch.float64)
    whole[..., [i for a, b in site.rows or ((0, site.full),) for i in range(a, b)], :] = (B @ A).detach()
    plain.weight.data += (whole.mT if site.transposed else whole).reshape(plain.weight.shape)
    # float64: sums of at most 24 products of size about 1
    assert delta(outputs(plain, ((X,), {})), adapted) < 1e-13

    gp.merge(model)
    assert delta(outputs(model, ((X,), {})), adapted) < 1e-13
    gp.unmerge(model)
    assert same(outputs(model, ((X,), {})), adapted)
    gp.remove(model)
    before.check(model)


NEITHER: dict[str, tuple[Use, tuple[int, ...]]] = {
    "some columns": (lambda m, x: x @ m.weight[:, 2:4], (8, 6)),
    "a weight made from another": (lambda m, x: F.linear(x, torch.tanh(m.weight)), (6, 8)),
    "a trace": (lambda m, x: torch.einsum("bsd,dd->bs", x, m.weight), (8, 8)),
    "summed away": (lambda m, x: torch.einsum("bsd,od->bs", x, m.weight), (6, 8)),
    "three factors": (lambda m, x: torch.einsum("bsd,btd,od->bsto", x, x, m.weight), (6, 8)),
    "no common axis": (lambda m, x: torch.einsum("bsd,ok->bsdok", x, m.weight), (2, 3)),
    "itself": (lambda m, x: x + (m.weight @ m.weight).sum(), (8, 8)),
}


@pytest.mark.parametrize("name", NEITHER)
def test_what_is_no_product_with_a_parameter(name: str) -> None:
    use, shape = NEITHER[name]
    assert not gp.sites(Bare(use, *shape).double().eval(), (X,))


ODD_ROWS: dict[str, tuple[Use, tuple[int, ...]]] = {
    "every other row": (lambda m, x: F.linear(x, m.weight[::2]), (0, 2, 4)),
    "the last rows": (lambda m, x: F.linear(x, m.weight[-2:]), (4, 5)),
}


@pytest.mark.parametrize("name", ODD_ROWS)
def test_odd_runs_of_rows_are_told_right_or_not_at_all(name: str) -> None:
    use, wanted = ODD_ROWS[name]
    for site in gp.sites(Bare(use, 6, 8).double().eval(), (X,)):
        assert tuple(i for a, b in site.rows or ((0, site.full),) for i in range(a, b)) == wanted


@pytest.mark.parametrize("shape", [(8,), (2, 2, 8, 6)], ids=["a vector", "a stack of stacks"])
def test_other_than_matrices_and_stacks_of_them(shape: tuple[int, ...]) -> None:
    """Either not taken, or with the number of features that one matrix reads."""
    found = gp.sites(Bare(lambda m, x: x @ m.weight, *shape).double().eval(), (X,))
    assert all(site.inputs == 8 for site in found)


SCALED: dict[str, tuple[Use, tuple[int, ...]]] = {
    "the weight": (lambda m, x: F.linear(x, m.weight * 0.5), (6, 8)),
    "the product": (lambda m, x: torch.addmm(m.bias, x.flatten(0, 1), m.weight, alpha=0.5), (8, 6)),
}


@pytest.mark.parametrize("name", SCALED)
def test_a_branch_is_no_stand_in_where_a_factor_is_applied(name: str) -> None:
    """y = (w / 2) x: a side path beside it would act in full, and merged into w by half."""
    use, shape = SCALED[name]
    model = Bare(use, *shape).double().eval()
    gp.apply(model, "path(weight):lora(r=2)", inputs=(X,))
    randomize(model)
    adapted = outputs(model, ((X,), {}))
    gp.merge(model)
    assert delta(outputs(model, ((X,), {})), adapted) < 1e-13  # float64


def test_symbolic_traces_read_as_exports_do() -> None:
    """Owners are traced with `torch.fx`, whose graphs have no shapes."""
    for name in ("linear", "x @ w", "x @ w.T", "addmm", "bsd,od->bso", "copied"):
        use, shape, read = SPELLINGS[name]
        graph = fx.symbolic_trace(Bare(use, *shape)).graph
        (found,) = [a for n in graph.nodes if (a := read_affine(n, lambda w: w.target == "weight"))]
        assert (found.transposed, found.plain, found.kind) == (read.transposed, True, "linear"), name
