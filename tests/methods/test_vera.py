"""VeRA: PEFT's draw and PEFT's numbers, one bank for the model, files with and without the projections."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from checks import build, call, outputs, randomize, same

import graphpeft as gp
from graphpeft.rewrite.state import chains

TOKENS = torch.randint(3, 100, (4, 12), generator=torch.Generator().manual_seed(0))


def test_one_bank_serves_every_site_and_survives_copies() -> None:
    model = gp.apply(build("llama"), "linear:vera(r=16)")

    def banks(of: torch.nn.Module) -> set[int]:
        return {id(c.factors[i].bank) for c in chains(of, "default").values() for i in (1, 3)}

    assert len(banks(model)) == 1
    clone = copy.deepcopy(model).to(torch.float64)
    assert len(banks(clone)) == 1
    assert banks(clone) != banks(model)
    bank = next(iter(chains(model, "default").values())).factors[1].bank
    widest = [max(s.shape[i] for s in chains(model, "default")) for i in (0, 1)]
    assert [bank.outputs, bank.inputs] == widest
    assert not [name for name in model.state_dict() if "bank" in name]


def test_a_second_adapter_is_captured_beside_shared_projections() -> None:
    """torch.export names modules by another scheme where one stands in two places, as a bank does."""
    model = gp.apply(build("llama"), "v:vera(r=16)", name="one")
    held = list(model.named_modules())
    gp.apply(model, "q:vera(r=16)", name="two")
    assert [len(chains(model, name)) for name in ("one", "two")] == [2, 2]
    gp.remove(model, "two")
    assert [name for name, _ in model.named_modules()] == [name for name, _ in held]


def test_peft_draws_computes_and_trains_the_same() -> None:
    import peft

    bare = build("llama")
    config = peft.VeraConfig(
        r=16, target_modules=["q_proj", "v_proj", "down_proj"], projection_prng_key=7, vera_dropout=0.0
    )
    theirs = peft.get_peft_model(copy.deepcopy(bare), config)
    ours = gp.apply(bare, "qv+down:vera(r=16, key=7)")
    generator = torch.Generator().manual_seed(1)
    for site, chain in chains(ours, "default").items():
        layer = theirs.base_model.model.get_submodule(site.owner)
        # To the bit: the same generator in the same order.
        assert torch.equal(chain.factors[3].matrix(), layer.vera_A["default"][:, : site.inputs])
        assert torch.equal(chain.factors[1].matrix(), layer.vera_B["default"][: site.outputs])
        with torch.no_grad():
            for mine, other in (
                (chain.factors[0].weight, layer.vera_lambda_b["default"]),
                (chain.factors[2].weight, layer.vera_lambda_d["default"]),
            ):
                assert torch.equal(mine, other)
                mine.copy_(torch.randn(mine.shape, generator=generator) * 0.1)
                other.copy_(mine)
    losses = []
    for model in (ours, theirs):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(10):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][0] - losses[0][-1] > 1e-2
    # float32; Adam divides by the size of gradients, so that their rounding grows a little with each step.
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_stored_projections_are_what_is_used(tmp_path: Path) -> None:
    model = gp.apply(build("llama"), "qv:vera(r=16, store=projection)")
    randomize(model)
    bank = next(iter(chains(model, "default").values())).factors[1].bank
    bank.B.mul_(2)  # as if another generator had drawn them
    model.eval()
    example = call("llama", model)
    wanted = outputs(model, example)
    gp.save(model, tmp_path)
    assert same(outputs(gp.load(build("llama"), tmp_path).eval(), example), wanted)


def test_experts_share_the_bank_too() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    model = gp.apply(MixtralForCausalLM(config).eval(), "q:vera(r=8); experts.down:vera(r=8)")
    stacked = next(c for s, c in chains(model, "default").items() if s.stack)
    assert stacked.factors[1].bank.B.dim() == 2
    assert stacked.trainable() == 3 * (32 + 8)
    randomize(model)
    assert torch.linalg.matrix_rank(stacked.delta()).tolist() == [8, 8, 8]
