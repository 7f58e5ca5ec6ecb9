"""Folding into the weights and back: B4 to B11 and B26 of PEFT's tests."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checks import Snapshot, adapters, same
from grid import HAND_MADE, TARGETS, Cell, apply, cells, close, fresh, models, rules, run
from safetensors.torch import load_file, save_file
from torch import nn

import graphpeft as gp
from graphpeft.errors import AdapterError

TOLERANCE = 1e-5
"""float32, a rounding per weight. PEFT allows 1e-5 on models of its own, 1e-4 on others, 1e-3 and more on convolutions."""


@cells()
def test_b04_merged_is_adapted_and_unmerged_is_as_before(cell: Cell) -> None:
    model = cell.adapted()
    adapted, base = cell.run(model), cell.run(cell.base())
    gp.merge(model)
    assert close(cell.run(model), adapted, TOLERANCE)
    assert not close(cell.run(model), base, 1e-3)
    assert {type(m) for m in model.modules()} == {type(m) for m in cell.base().modules()}
    gp.unmerge(model)
    assert same(cell.run(model), adapted)  # to the bit; PEFT allows what it does for merging


@cells()
def test_b05_a_merged_state_dict_is_that_of_a_plain_model(cell: Cell, tmp_path: Path) -> None:
    """Every merge is what PEFT calls a safe one: on copies, checked for finite numbers, of contiguous tensors."""
    model = cell.adapted()
    adapted = cell.run(model)
    gp.merge(model)
    plain = cell.base()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(tensor.is_contiguous() for tensor in model.state_dict().values())
    # safetensors takes no two names for one tensor
    tied = {n for n, _ in model.named_parameters(remove_duplicate=False)} - {n for n, _ in model.named_parameters()}
    save_file({n: t for n, t in model.state_dict().items() if n not in tied}, tmp_path / "merged.safetensors")
    assert set(plain.load_state_dict(load_file(tmp_path / "merged.safetensors"), strict=False).missing_keys) == tied
    assert same(cell.run(plain), cell.run(model))
    assert close(cell.run(plain), adapted, TOLERANCE)


@cells(HAND_MADE)
def test_b06_what_is_not_finite_is_refused_by_name_and_nothing_is_merged(cell: Cell) -> None:
    """PEFT says which adapter with `safe_merge=True`, and of most methods has no test that the base is left alone."""
    model = cell.adapted()
    # Of the last site, so that a merge in progress would have changed others.
    spoiled = [p for name, p in adapters(model).items() if not name.endswith(("logits", "log_range"))][-1]
    held, before = spoiled.detach().clone(), Snapshot.of(model)
    for value in (float("nan"),) if cell.method == "blora" else (float("nan"), float("inf")):  # rounding clips infinity
        spoiled.data.view(-1)[0] = value
        with pytest.raises(AdapterError, match=r"'default' at .* has NaN or infinite values; the model is unchanged"):
            gp.merge(model)
        spoiled.data.copy_(held)
        before.check(model)
    gp.merge(model)
    assert not same(cell.run(model), cell.run(cell.base()))


@models()
def test_b07_a_second_merge_is_refused_and_changes_nothing(name: str) -> None:
    """PEFT warns, and changes nothing either."""
    model = apply(name, fresh(name), rules(name, "lora"))
    adapted = run(name, model)
    gp.merge(model)
    merged = Snapshot.of(model)
    with pytest.raises(AdapterError, match=r"Cannot merge while default is merged.*gp\.unmerge"):
        gp.merge(model)
    merged.check(model)
    gp.unmerge(model)
    assert same(run(name, model), adapted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@cells(HAND_MADE)
def test_b08_merging_in_half_precision(cell: Cell, dtype: torch.dtype) -> None:
    """Of adapters in float32 and in half precision. PEFT's test is that it does not crash."""
    model = cell.adapted(dtype, std=0.1)
    for _ in range(2):
        adapted, base = cell.run(model), {n: p.clone() for n, p in model.named_parameters()}
        gp.merge(model)
        merged = cell.run(model)
        assert {t.dtype for t in (*merged, *model.state_dict().values())} == {dtype}
        # Weights and activations round in other places, some ten times on top of one another.
        limit = 10 * torch.finfo(dtype).eps * max(1.0, *(float(t.abs().max()) for t in adapted))
        assert all((a - b).abs().max() < limit for a, b in zip(merged, adapted, strict=True))
        assert not same(merged, cell.run(cell.base(dtype)))
        gp.unmerge(model)
        assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())
        model.to(dtype)


SEVERAL = {"one": (0, "lora(r=4)"), "two": (1, "dora(r=4)"), "three": (0, "rlora(r=8)"), "four": (0, "dora(r=4)")}
"""Adapters, each on one of the two sets of sites."""
TOGETHER = (
    "one",
    ("two",),
    ("one", "two"),
    ("one", "three"),
    ("three", "one"),
    ("four", "one", "two"),
    ("three", "four"),
)


def several(name: str) -> nn.Module:
    """A model with the adapters above, none of them active."""
    model = fresh(name)
    for adapter, (targets, method) in SEVERAL.items():
        apply(name, model, f"{TARGETS[name][targets]}:{method}", name=adapter)
    gp.activate(model, None)
    return model


@models("gpt2")
def test_b09_merging_some_of_several_adapters(name: str) -> None:
    """As each does alone, and as they do together; in one merge, for a second one on top is refused (see B7)."""
    model = several(name)
    base = run(name, model)
    seen = []
    for chosen in TOGETHER:
        gp.activate(model, chosen)
        active = run(name, model)
        assert all(not close(active, other, 1e-3) for other in (base, *seen)) or chosen == ("three", "one")
        seen.append(active)
        gp.activate(model, None)
        gp.merge(model, chosen)
        assert close(run(name, model), active, TOLERANCE)  # PEFT allows 1e-3
        gp.unmerge(model)
        assert same(run(name, model), base)


@pytest.mark.parametrize("state", ["active", "disabled", "merged"])
@cells(HAND_MADE)
def test_b10_what_is_removed_leaves_no_trace(cell: Cell, state: str) -> None:
    """PEFT says `unload()`, and allows the base's output to be off by 1e-4."""
    model, base = cell.adapted(), cell.base()
    before = Snapshot.of(base)
    assert len(model.state_dict()) > len(before.tensors)
    if state == "disabled":
        gp.activate(model, None)
    if state == "merged":
        gp.merge(model)
    gp.remove(model)
    replace(before, identities=Snapshot.of(model).identities).check(model)  # it was a copy already
    assert same(cell.run(model), cell.run(base))


@cells()
def test_b11_a_merged_model_survives_saving(cell: Cell, tmp_path: Path) -> None:
    """By transformers, which then knows of no adapter; whole, as pickles are."""
    model = cell.adapted()
    adapted = cell.run(model)
    gp.merge(model)
    merged = cell.run(model)
    assert not same(merged, cell.run(cell.base()))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert same(cell.run(again), merged)
    gp.unmerge(again)
    assert same(cell.run(again), adapted)
    if cell.name not in HAND_MADE:
        model.save_pretrained(tmp_path)  # type: ignore[operator]
        assert same(cell.run(type(model).from_pretrained(tmp_path).eval()), merged)  # type: ignore[attr-defined]


@models("gpt2")
def test_b26_base_weights_keep_their_names(name: str) -> None:
    """They are read and written under them while adapters are on. PEFT has `get_base_model_state_dict` and its like."""
    model, other = apply(name, fresh(name), rules(name, "lora")), fresh(name)
    base = other.state_dict()
    assert all(torch.equal(model.state_dict()[n], t) for n, t in base.items())
    nn.init.normal_(next(p for n, p in other.named_parameters() if p.dim() > 1))
    missing = model.load_state_dict(other.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) == set(adapters(model))
    with gp.disabled(model):
        assert same(run(name, model), run(name, other))
    apply(name, other, rules(name, "lora"))
    assert same(run(name, model), run(name, other))
