"""B-LoRA on real graphs: gates that act in training, decided in evaluation, compacted with equal outputs, and counted."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from checks import Snapshot, build, call, delta, outputs, randomize, same
from safetensors.torch import load_file
from torch import nn

import graphpeft as gp
from graphpeft.chain import IntCodes, LearnedQuantizer, RankGate, Weighted
from graphpeft.errors import AdapterError, RuleError
from graphpeft.ir.weights import site_matrix
from graphpeft.methods import BLoRA
from graphpeft.rewrite.state import chains, get_state


def decide(model: nn.Module, bits: tuple[int, ...] = (8, 4, 16), rank: int = 3) -> None:
    """Gates as training might leave them, and random tensors in ranges that clip a few of their entries."""
    randomize(model, std=0.3)
    for chain in chains(model, "default").values():
        weighted(chain)[1].weight.data.fill_(0.5)  # not one that few bits round to zero
        for factor, width in zip(weighted(chain), bits, strict=True):
            for transform in factor.applied:
                logits = transform.logits.data
                if isinstance(transform, LearnedQuantizer):
                    transform.log_range.data.fill_(-0.5)
                    logits[:] = torch.tensor([3.0 if w <= width else -3.0 for w in (2, 4, 8, 16, 32)[transform.free :]])
                else:
                    logits[:] = torch.tensor([3.0 if k < rank else -3.0 for k in range(transform.free, 8)])


def weighted(chain: nn.Module) -> list[Weighted]:
    return [factor for factor in chain.factors if isinstance(factor, Weighted)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # gpt2: rows of a fused, transposed weight
def test_compacting_keeps_outputs_and_makes_smaller_tensors(name: str, tmp_path: Path) -> None:
    model = build(name)
    example, before = call(name, model), Snapshot.of(model)
    base = outputs(model, example)
    gp.apply(model, "qv:blora(alpha=16)", verify="full")
    model.eval()
    assert same(outputs(model, example), base)
    decide(model)
    adapted = outputs(model, example)
    assert delta(adapted, base) > 1e-2
    large = sum(path.stat().st_size for path in gp.save(model, tmp_path / "large").iterdir())
    assert same(outputs(gp.load(build(name), tmp_path / "large").eval(), example), adapted)
    clone = copy.deepcopy(model)
    gp.compact(model)
    compacted = outputs(model, example)
    # float32 sums of three terms where there were eight.
    assert delta(compacted, adapted) < 1e-5
    for entry in get_state(model).adapters["default"].entries:
        assert str(entry.method) == "blora(r=3, alpha=6.0, bits=(8, 4, 16))"
    for chain in chains(model, "default").values():
        assert [f.weight.dtype for f in weighted(chain)] == [torch.int8, torch.int8, torch.int16]
        assert chain.rank == 3
        assert not any(isinstance(m, (LearnedQuantizer, RankGate)) for m in chain.modules())
        assert torch.linalg.matrix_rank(chain.delta(), rtol=1e-5) == 3
    folder = gp.save(model, tmp_path / "small")
    tensors, old = (load_file(tmp_path / f / "adapter.safetensors") for f in ("small", "large"))
    small = sum(t.numel() * t.element_size() for t in tensors.values())
    assert small < sum(t.numel() * t.element_size() for t in old.values()) / 5
    assert large > sum(path.stat().st_size for path in folder.iterdir())
    assert same(outputs(gp.load(build(name), folder).eval(), example), compacted)
    for other in (model, clone):
        gp.merge(other)
        assert delta(outputs(other, example), adapted) < 1e-5
        gp.unmerge(other)
    gp.lower(model)
    assert delta(outputs(model, example), compacted) < 1e-5
    gp.remove(model)
    before.check(model)


def test_training_is_random_and_moves_gates() -> None:
    model = gp.apply(build("llama"), "qv:blora(start=1.0, lambda_bits=0.1, lambda_rank=0.1, logit=2.0)")
    decide(model)
    for module in model.modules():
        if isinstance(module, (LearnedQuantizer, RankGate)):
            module.logits.data.fill_(0.5)
    example = call("llama", model)
    model.train()
    torch.manual_seed(0)
    assert delta(outputs(model, example), outputs(model, example)) > 1e-4
    loss = model(**example[1]).logits.square().mean() + gp.penalty(model)
    loss.backward()
    gated = [m for m in model.modules() if isinstance(m, (LearnedQuantizer, RankGate))]
    assert len(gated) == 4 * 4
    assert all(gate.logits.grad is not None and gate.logits.grad.any() for gate in gated)
    assert all(gate.log_range.grad is not None for gate in gated if isinstance(gate, LearnedQuantizer))
    model.eval()
    assert same(outputs(model, example), outputs(model, example))


def test_the_penalty_alone_closes_gates_in_order() -> None:
    model = gp.apply(build("llama"), "q:blora(lambda_bits=1.0, lambda_rank=1.0, logit=0.5)")
    optimizer = torch.optim.Adam(gp.parameter_groups(model, 1e-3, gate_lr=0.1))
    rates = {rate: sum(len(g["params"]) for g in optimizer.param_groups if g["lr"] == rate) for rate in (1e-3, 0.1)}
    assert rates == {
        1e-3: 6,
        0.1: 2 * (3 * 2 + 1),
    }  # two sites; logits and a range for each of three ladders, a rank gate
    gp.add_penalties(model, optimizer)
    for _ in range(40):
        optimizer.step()
    (chain, _) = chains(model, "default").values()
    assert [m.bits() for m in chain.modules() if isinstance(m, LearnedQuantizer)] == [2, 2, 2]
    assert chain.factors[1].applied[1].kept() == 1


def test_every_rounding_is_penalized() -> None:
    model = gp.apply(build("llama"), "q:blora(quantize=all, lambda_bits=1.0, cost=bop)")
    gp.penalty(model).backward()
    ladders = [m for m in model.modules() if isinstance(m, LearnedQuantizer)]
    assert len(ladders) == 2 * 5
    assert all(ladder.logits.grad is not None and ladder.logits.grad.all() for ladder in ladders)
    assert {ladder.largest.macs for ladder in ladders} == {64 * 64}  # the base weight is the largest tensor
    chain = next(iter(chains(model, "default").values()))
    b, base = chain.factors[0].applied[0], chain.reweight.rounding
    assert b.logits.grad[0] / base.logits.grad[0] == pytest.approx(8 / 64)


def test_bit_operations() -> None:
    model = gp.apply(build("llama"), "q:blora")
    wide, base = 8 * (64 + 1 + 64) * 2 * 1024, 2 * 64 * 64 * 1024
    found = gp.bops(model)
    assert (found.adapters, found.base, found.total) == (wide, base, wide + base)
    decide(model)  # B 8, E 4, A 16 bits, rank 3
    found = gp.bops(model)
    now = 2 * 32 * 3 * (64 * 8 + 4 + 64 * 16)
    assert (found.adapters, found.base) == (now, base)
    assert found.reference.adapters == wide
    assert f"{now / wide:.1%}" in str(found)
    gp.compact(model)
    assert gp.bops(model).adapters == now


def test_sites_without_anything_left_are_dropped(tmp_path: Path) -> None:
    model = gp.apply(build("llama"), "qv:blora(drop=true)")
    example = call("llama", model)
    decide(model)
    first, *rest = chains(model, "default").items()
    first[1].factors[0].applied[0].logits.data.fill_(-3.0)
    adapted = outputs(model, example)
    gp.compact(model)
    assert delta(outputs(model, example), adapted) < 1e-5
    assert list(chains(model, "default")) == [site for site, _ in rest]
    assert not hasattr(model.get_submodule(first[0].owner), "adapters")
    assert len(get_state(model).adapters["default"].entries) == len(rest)
    gp.verify(model)
    folder = gp.save(model, tmp_path)
    assert same(outputs(gp.load(build("llama"), folder).eval(), example), outputs(model, example))
    gp.remove(model)


def test_a_compacted_adapter_of_full_precision_trains_on() -> None:
    model = gp.apply(build("llama"), "q:blora(r=8)")
    decide(model, bits=(32, 32, 32), rank=5)
    example = call("llama", model)
    model.eval()
    adapted = outputs(model, example)
    gp.compact(model)
    assert gp.trainable(model)[0] == 2 * 5 * 129
    assert delta(outputs(model, example), adapted) < 1e-5
    gp.verify(model)


def test_in_half_precision_casts_are_as_planned() -> None:
    model = gp.apply(build("llama", dtype=torch.bfloat16), "q:blora")
    decide(model)
    example = call("llama", model)
    model.eval()
    adapted = outputs(model, example)
    gp.compact(model)
    assert not list(next(iter(chains(model, "default").values())).parameters())
    # Sums in float32, rounded to bfloat16 once per projection: its step at outputs below 4 is 2^-6.
    assert delta(outputs(model, example), adapted) <= 2**-6
    assert all(isinstance(m, IntCodes) is False or m.step.dtype == torch.float32 for m in model.modules())


def test_the_base_weight_is_read_at_the_learned_precision(tmp_path: Path) -> None:
    model = build("gpt2")  # q and v are rows of one transposed weight
    example, before = call("gpt2", model), Snapshot.of(model)
    base = outputs(model, example)
    gp.apply(model, "qv:blora(quantize=base)", verify="full")
    model.eval()
    assert same(outputs(model, example), base)
    decide(model, bits=(32, 32, 32), rank=8)
    for site, chain in chains(model, "default").items():
        rounding = chain.reweight.rounding
        rounding.logits.data[:] = torch.tensor([3.0, -3.0, -3.0, -3.0])  # 4 bits
        rounding.log_range.data.fill_(float(site_matrix(model, site).abs().max().log()) + 1e-6)
        seen = site_matrix(model, site) + torch.cat([chain.delta(site_matrix(model, site))[a:b] for a, b in site.rows])
        seen = seen - chain.scale * torch.linalg.multi_dot([f.matrix() for f in weighted(chain)])
        assert len(seen.mul(1e4).round().unique()) <= 15
    adapted = outputs(model, example)
    assert delta(adapted, base) > 1e-3
    found = gp.bops(model)
    assert found.base == found.reference.base / 8
    gp.compact(model)
    assert delta(outputs(model, example), adapted) < 1e-5  # float32
    assert "quantize=base, bits=(32, 32, 32, 4)" in str(get_state(model).adapters["default"].entries[0].method)
    assert gp.bops(model).base == found.base
    gp.save(model, tmp_path)
    assert same(outputs(gp.load(build("gpt2"), tmp_path).eval(), example), outputs(model, example))
    gp.merge(model)
    assert delta(outputs(model, example), adapted) < 1e-5
    gp.unmerge(model)
    gp.remove(model)
    before.check(model)


def test_the_input_is_rounded_for_base_and_adapter(tmp_path: Path) -> None:
    model = build("llama")
    example, before = call("llama", model), Snapshot.of(model)
    base = outputs(model, example)
    gp.apply(model, "q:blora(quantize=all)", verify="full")
    model.eval()
    assert same(outputs(model, example), base)
    with pytest.raises(
        AdapterError, match=r"rounds its input, and has seen no data.*in training mode, before compacting"
    ):
        gp.compact(model)
    model.train()
    outputs(model, example)
    model.eval()
    decide(model)
    chain = next(iter(chains(model, "default").values()))
    assert chain.before.seen()
    reads: list[torch.Tensor] = []
    handle = chain.before.register_forward_hook(lambda module, args, output: reads.append(output))
    chain.before.logits.data[:] = torch.tensor([3.0, -3.0, -3.0, -3.0])
    adapted = outputs(model, example)
    handle.remove()
    assert len(reads) == 1
    assert len(reads[0].unique()) <= 15
    owner = model.model.layers[0].self_attn.q_proj
    site = next(iter(chains(model, "default")))
    weight = site_matrix(model, site)
    # The projection is that of the rounded input by the rounded weight and the update; float32 sums of 64 terms.
    torch.testing.assert_close(owner(reads[0]), reads[0] @ (weight + chain.delta(weight)).T, atol=1e-5, rtol=1e-4)
    found = gp.bops(model)
    assert found.base == found.reference.base * (4 / 32 + 1) / 2  # of two sites one
    gp.compact(model)
    assert delta(outputs(model, example), adapted) < 1e-5
    assert gp.bops(model).base == found.base
    gp.save(model, tmp_path)
    assert same(outputs(gp.load(build("llama"), tmp_path).eval(), example), outputs(model, example))
    for act, message in {
        gp.merge: "so the adapter 'default' cannot be folded into",
        gp.lower: "so the adapter is no LoRA pair",
    }.items():
        with pytest.raises(AdapterError, match=message):
            act(model)
    assert gp.verify(model).ok
    gp.remove(model)
    before.check(model)
    with pytest.raises(AdapterError, match=r"c_attn\.weight \(q\) cannot have its input rounded"):
        gp.apply(build("gpt2"), "q:blora(quantize=all)")


def test_refusals_change_nothing() -> None:
    model = build("llama")
    gp.apply(model, "q:lora")
    with pytest.raises(AdapterError, match=r"No adapter of LlamaForCausalLM has gates.*Train one that has: `blora`"):
        gp.compact(model)
    gp.remove(model)
    gp.apply(model, "q:blora(drop=true)")
    decide(model, bits=(0, 0, 0))
    held = Snapshot.of(model)
    with pytest.raises(AdapterError, match=r"Nothing is left of adapter 'default'.*smaller one, or call gp\.remove"):
        gp.compact(model)
    held.check(model)
    gp.merge(model)
    with pytest.raises(AdapterError, match="Cannot compact while default is merged"):
        gp.compact(model)
    with torch.device("meta"):
        empty = type(model)(model.config)
    gp.apply(empty, "q:blora")
    with pytest.raises(AdapterError, match=r"has no values at .*meta device"):
        gp.compact(empty)
    with pytest.raises(RuleError, match="drop=true needs quantize=adapter"):
        BLoRA(drop=True, quantize="base")
    for wrong in (
        dict(lambda_bits=-1.0),
        dict(bits=(8, 8)),
        dict(bits=(3, 8, 8)),
        dict(cost="free"),
        dict(r=0),
        dict(bits=(8, 8, 8), quantize="base"),
    ):
        with pytest.raises(RuleError, match=f"option {next(iter(wrong))}"):
            BLoRA(**wrong)
