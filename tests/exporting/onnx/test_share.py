"""One product with A for sites that read one activation: fewer nodes, the same numbers, the same adapters."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
import zoo
from exports import CLOSE, FAR, SAMPLE, adapt, arrays, ids, off, running, serving

from graphpeft.errors import FileError
from graphpeft.exporting import parity
from graphpeft.passes.export import export
from graphpeft.runtime.adapter_file import read
from graphpeft.runtime.layout import Slot, a_of, b_of, blended, concat_adapters, unfilled
from graphpeft.runtime.session import Session

ATTENTION, MLP = "model.layers.0.self_attn.", "model.layers.0.mlp."
QKV = tuple(f"{ATTENTION}{name}_proj" for name in "qkv")
GATES = tuple(f"{MLP}{name}_proj" for name in ("gate", "up"))
DOWN = (f"{MLP}down_proj",)


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same model and adapters with a slot for each site."""
    folder = tmp_path_factory.mktemp("apart") / "deploy"
    export(serving("llama").model, folder, share=False, verify="off")
    return folder


@cache
def shared() -> Path:
    return serving("llama").folder


def products(folder: Path) -> dict[str, list[ir.Node]]:
    """The products that read each slot input; with B one that also adds."""
    inputs = ir.load(folder / "model.onnx").graph.inputs
    slots = [value for value in inputs if ".lora_" in value.name]
    return {value.name: [use.node for use in value.uses() if use.node.op_type in ("MatMul", "Gemm")] for value in slots}


def test_sites_of_one_activation_share_a_product(apart: Path) -> None:
    assert [slot.sites for slot in Session(shared()).graphs["model"].slots] == [QKV, GATES, DOWN]
    assert [slot.sites for slot in Session(apart).graphs["model"].slots] == [(site,) for site in QKV + GATES + DOWN]
    one, other = products(shared()), products(apart)
    assert all(len(nodes) == 1 for nodes in (*one.values(), *other.values()))
    assert len(one) == 3 + 6
    assert len(other) == 6 + 6
    for slot in Session(shared()).graphs["model"].slots:
        (product,) = one[slot.a]
        assert [use.node for use in product.outputs[0].uses()] == [one[b_of(site)][0] for site in slot.sites]


@pytest.mark.parametrize("use", [None, "a", "b"])
def test_both_graphs_answer_as_pytorch_does(apart: Path, use: str | None) -> None:
    inputs = ids(3, 7, left=2)
    want = running(serving("llama").model, use, inputs)
    for folder in (shared(), apart):
        session = Session(folder)
        session.use(use)
        # Relative to logits of 10 and more.
        assert parity.distance(session.run(arrays(inputs)), {"logits": want})[0] < CLOSE
    assert use is None or off(want, running(serving("llama").model, None, inputs)) > FAR


def test_an_adapter_with_a_slot_for_each_site_fits_the_shared_graph(apart: Path) -> None:
    inputs = arrays(ids(2, 5))
    session = Session(shared())
    for name in "ab":
        tensors = read(apart / f"{name}.onnx_adapter")
        sites = {key.rpartition(".lora_")[0] for key in tensors}
        assert set(tensors) == {key for site in sites for key in (a_of(site), b_of(site))}  # as Olive lays them out
        session.add(apart / f"{name}.onnx_adapter", name=f"{name} apart")
        session.use(name)
        want = session.run(inputs)["logits"]
        session.use(f"{name} apart")
        assert np.array_equal(session.run(inputs)["logits"], want)


def test_an_adapter_for_shared_slots_is_refused_by_a_graph_without_them(apart: Path) -> None:
    with pytest.raises(FileError, match=r"a.onnx_adapter: the graph has no slot '.*_proj\+.*.lora_A.weight'"):
        Session(apart).add(shared() / "a.onnx_adapter", name="c")


def test_a_weight_with_two_call_sites_keeps_a_slot_of_its_own(tmp_path: Path) -> None:
    class Twice(zoo.HandWritten):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(super().forward(x))

    torch.manual_seed(0)
    model = adapt(Twice().eval(), ["qv:lora(r=2); path(out):lora"], inputs=SAMPLE)
    export(model, tmp_path / "deploy", inputs=SAMPLE, share=True, verify="off")
    session = Session(tmp_path / "deploy")
    assert [slot.sites for slot in session.graphs["model"].slots] == [("wq",), ("wv",), ("out",)]
    assert {name: len(nodes) for name, nodes in products(tmp_path / "deploy").items()} == {
        name: 2 for site in ("wq", "wv", "out") for name in (a_of(site), b_of(site))
    }
    for use in (None, "a"):
        session.use(use)
        # Two layers, the second on values up to 10.
        assert off(session.run(arrays(SAMPLE))["output"], running(model, use, SAMPLE)) < 10 * CLOSE


# -- what goes into a slot -----------------------------------------------------------------------------------------

SLOT = Slot(4, (("block.q", 3), ("block.k", 2)), "rank")


def pair(rank: int, outputs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.standard_normal((4, rank)), random.standard_normal((rank, outputs))


def test_a_missing_site_gets_zero_rows() -> None:
    a, b = pair(5, 2)
    filled = SLOT.filled({"block.k": (a, b)})
    assert SLOT.a == "block.q+k.lora_A.weight"
    assert set(filled) == set(SLOT.shapes)
    assert np.array_equal(filled[SLOT.a], a)
    assert np.array_equal(filled[b_of("block.k")], b)
    assert filled[b_of("block.q")].shape == (5, 3)
    assert not filled[b_of("block.q")].any()
    assert SLOT.filled({"elsewhere": (a, b)}) == {}


def test_pairs_side_by_side_do_not_touch() -> None:
    pairs = {"block.q": pair(2, 3, 1), "block.k": pair(5, 2, 2)}
    filled = SLOT.filled(pairs)
    assert filled[SLOT.a].shape == (4, 7)
    for site, (a, b) in pairs.items():
        # fp64 sums of 7 terms, 5 of which are zero
        assert np.abs(filled[SLOT.a] @ filled[b_of(site)] - a @ b).max() < 1e-14
    again = unfilled([SLOT], filled)
    assert {site: (x @ y).round(12).tolist() for site, (x, y) in again.items()} == {
        site: (x @ y).round(12).tolist() for site, (x, y) in pairs.items()
    }


def test_a_blend_is_the_sum_by_strength_at_every_site() -> None:
    one, other = {"block.q": pair(2, 3, 1)}, {"block.q": pair(1, 3, 2), "block.k": pair(5, 2, 3)}
    made = blended([(one, 0.25), (other, -2.0)])
    products = {site: a @ b for site, (a, b) in made.items()}
    want = 0.25 * one["block.q"][0] @ one["block.q"][1] - 2 * other["block.q"][0] @ other["block.q"][1]
    # fp64 sums of 3 and 5 terms
    assert np.abs(products["block.q"] - want).max() < 1e-14
    assert np.abs(products["block.k"] + 2 * other["block.k"][0] @ other["block.k"][1]).max() < 1e-14


def test_a_bank_says_whose_each_unit_of_rank_is() -> None:
    adapters = [
        {"block.q": pair(2, 3, 1)},
        {"elsewhere": pair(1, 1)},
        {"block.q": pair(1, 3, 2), "block.k": pair(3, 2, 3)},
    ]
    tensors = concat_adapters([SLOT], adapters)
    assert tensors[SLOT.segments].tolist() == [0, 0, 2, 2, 2, 2]
    for number, pairs in enumerate(adapters):
        units = tensors[SLOT.segments] == number
        for site in SLOT.sites:
            a, b = pairs.get(site, (np.zeros((4, 0)), np.zeros((0, dict(SLOT.members)[site]))))
            # fp64 sums of 4 terms
            assert np.abs(tensors[SLOT.a][:, units] @ tensors[b_of(site)][units] - a @ b).max() < 1e-14
