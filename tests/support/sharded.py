"""An adapted model under FSDP2, from training to removal, and in one process without it, for tests to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from checks import adapters, build, randomize
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from zoo import mixtral

import graphpeft as gp
from graphpeft.errors import AdapterError
from graphpeft.rewrite.state import get_state

RULES = (
    "q:lora(r=4); v:dora(r=4); o:melora(n=2, r=2); k:olora(r=2); up:rlora(r=16); down:vera(r=8); embed+head:lora(r=2)"
)
STEPS, RATE = 3, 0.5
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def shard(model: Any, **options: Any) -> nn.Module:
    """In the units that accelerate makes: every block, the table, what ends the model, and the rest."""
    if options.pop("apart", False):
        for child in model.children():
            fully_shard(child)
    inner = getattr(model, "model", None)
    for unit in [*inner.layers, inner.embed_tokens, [inner.norm, model.lm_head]] if inner is not None else []:
        fully_shard(unit, **options)
    return fully_shard(model, **options)


def text(model: Any, rank: int, workers: int) -> Tensor:
    ids = runs.Rows().ids[rank::workers]
    return model(input_ids=ids, labels=ids).loss


def features(model: nn.Module, rank: int, workers: int) -> Tensor:
    x = torch.randn(8, 5, 32, generator=torch.Generator().manual_seed(3))
    return model(x[rank::workers]).square().mean()


def exported() -> nn.Module:
    """A whole graph, whose owner is the root."""
    x = torch.randn(8, 5, 32)
    sizes = {"x": {0: torch.export.Dim("batch", min=2)}}
    return torch.export.export(build("hand_written"), (x,), dynamic_shapes=sizes).module(check_guards=False)


class Reads(nn.Module):
    """Weights that are read as weight + ΔW: of convolutions, and of attention that reads past its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True)
        self.wide = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return self.wide(x[:, None]).sum(1)


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return make().eval()

    return made


Loss = Callable[[Any, int, int], Tensor]
KINDS: dict[str, tuple[Callable[[], nn.Module], str, Loss, dict[str, Any]]] = {
    "llama": (lambda: build("llama"), RULES, text, {}),
    "bfloat16": (lambda: build("llama", dtype=torch.bfloat16), "qv:lora(r=4); up:dora(r=4)", text, {}),
    "policy": (lambda: build("llama", dtype=torch.bfloat16), "qv:lora(r=4); up:dora(r=4)", text, {"mp_policy": HALF}),
    "root": (lambda: build("hand_written"), "qv:lora(r=4); o:dora", features, {}),
    "graph": (exported, "qv:lora(r=4); o:dora", features, {}),
    "reads": (seeded(Reads), "conv:lora(r=2); qv:lora(r=2); o:dora(r=2)", features, {}),
    "apart": (seeded(Reads), "conv:dora(r=2); qkvo:lora(r=2)", features, {"apart": True}),
    "experts": (seeded(mixtral), "experts:lora(r=2)", text, {}),
}
READS = ("reads", "apart", "experts")
"""Kinds whose sites take the weight form."""


def life(kind: str, folder: Path, workers: int = 1, rank: int = 0) -> dict[str, list[float]]:
    """Losses at every stage. The batch is the same however many processes share it."""
    make, rules, loss, options = KINDS[kind]
    model = gp.apply(make(), rules, inputs=(torch.randn(8, 5, 32),) if loss is features else None)
    randomize(model, std=0.1)
    if workers > 1:
        shard(model, **options)
        assert all(isinstance(p, DTensor) for p in model.parameters())

    def now() -> float:
        with torch.no_grad():
            return float(shared(loss(model, rank, workers).detach(), workers))

    found = {"trained": train(model, loss, workers, rank), "then": [now()]}
    assert all(p.dtype == torch.float32 for p in adapters(model).values())
    gp.save(model, folder)
    with gp.disabled(model):
        found["disabled"] = [now()]
    gp.activate(model, {"default": 0.5})
    found["half"] = [now()]
    gp.activate(model, "default")
    found["again"] = [now()]
    assert found["disabled"] != found["again"]
    if kind in READS:
        assert {entry.site.form for entry in get_state(model).adapters["default"].entries} == {"weight"}
    else:
        found["rows"] = [rows(model, loss, now, rank, workers)]
        assert found["rows"] not in (found["again"], found["disabled"])
    found["explained"] = [site.now.update or 0.0 for site in gp.explain(model).adapters[0].sites]
    gp.merge(model)
    found["merged"] = [now()]
    gp.unmerge(model)
    found["unmerged"] = [now()]
    if workers > 1:
        refused(model, folder)
    gp.remove(model)
    found["removed"] = [now()]
    assert isinstance(model, FSDPModule) == (workers > 1)
    return found


def rows(model: nn.Module, loss: Loss, now: Callable[[], float], rank: int, workers: int) -> float:
    given = ["default", "default", None, "default", None, None, None, "default"] * (
        runs.BATCH // 8 if loss is text else 1
    )
    with gp.per_row(model, given[rank::workers]):
        return now()


def train(model: nn.Module, loss: Loss, workers: int, rank: int) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss(model, rank, workers)
        value.backward()
        optimizer.step()
        found.append(float(shared(value.detach(), workers)))
    return found


def shared(value: Tensor, workers: int) -> Tensor:
    """The mean over all processes."""
    if workers > 1:
        dist.all_reduce(value)
    return value / workers


def refused(model: nn.Module, folder: Path) -> None:
    for act in (
        lambda: gp.apply(model, "o:lora", name="second"),
        lambda: gp.load(model, folder, "second"),
        lambda: gp.swap(model, folder),
        lambda: gp.PAC(examples=5).attach(model),
        lambda: gp.lower(model),
        lambda: gp.compact(model),
        lambda: gp.export(model, "nowhere"),
    ):
        with pytest.raises(AdapterError, match="is sharded over 2 processes"):
            act()
    with pytest.raises(AdapterError, match="no adapter 'other'"):
        gp.save(model, "nowhere", "other")


def penalized(workers: int = 1, rank: int = 0) -> dict[str, Any]:
    """A PAC-Bayes penalty, added by the optimizer and to the loss, from tensors that every process has parts of."""
    found = {}
    for adds in (True, False):
        model, pac = runs.adapted("trained")
        losses = runs.plain_loop(model, pac, adds=adds, workers=workers, rank=rank, wrap=shard)
        found[str(adds)] = [*losses, pac.kl(model).item(), pac.penalty(model).item()]
        assert get_state(model).adapters["default"].objective is pac
    return found


def flat(workers: int = 1, rank: int = 0) -> dict[str, list[float]]:
    """FSDP1: it trains as one process does, and what it cannot put together is refused."""
    model: nn.Module = gp.apply(seeded(Reads)(), KINDS["reads"][1], inputs=(torch.randn(8, 5, 32),))
    randomize(model, std=0.1)
    if workers == 1:
        return {"trained": train(model, features, workers, rank)}
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    found = {"trained": train(wrapped, features, workers, rank)}
    for act in (
        lambda: gp.save(model, "nowhere"),
        lambda: gp.merge(model),
        lambda: gp.apply(model, "o:lora", name="b"),
    ):
        with pytest.raises(AdapterError, match=r"FullyShardedDataParallel \(FSDP1\).*fully_shard"):
            act()
    return found


OFTEN = ("llama", "policy", "root", "reads", "experts")
"""By default: the other kinds differ from one of these in one respect."""


def everything(folder: Path, kinds: Iterable[str], workers: int = 1, rank: int = 0) -> dict[str, Any]:
    lives = {kind: life(kind, folder / kind, workers, rank) for kind in kinds}
    return lives | {"penalized": penalized(workers, rank), "flat": flat(workers, rank)}
