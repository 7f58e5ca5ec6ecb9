"""The graph that is shown is the graph that runs: its numbers, and its shape against graphs that were made in other ways."""

from __future__ import annotations

from functools import partial
from typing import Any

import networkx
import pytest
import torch
from checks import sampled
from networkx.algorithms.isomorphism import categorical_multiedge_match, categorical_node_match
from torch import fx, nn
from torch.utils._pytree import tree_leaves
from zoo import clip, gpt2, llama, mixtral, t5

import graphpeft as gp
from graphpeft.capturing.capture import example_call, inference_view
from graphpeft.capturing.outputs import difference, floats
from graphpeft.inspect.network import network
from graphpeft.inspect.rewrite import CapturedGraph, Rewrite, rewrite
from graphpeft.rewrite.sync import inactive

CASES = {
    "llama lora": (partial(llama, layers=1), "qv:lora; mlp:olora(r=2)"),
    "llama dora": (partial(llama, layers=1), "linear:dora"),
    "llama blora": (partial(llama, layers=1), "qv:blora"),
    "gpt2 fused": (partial(gpt2, n_layer=1), "qv:rlora; mlp:melora(n=2)"),
    "t5 cross and tied": (partial(t5, num_layers=1), "q[cross]:vera; embed:lora; k:dora"),
    "mixtral experts": (mixtral, "attn:lora; experts:lora(r=2)"),
}


def adapted(case: str, seed: int = 0) -> nn.Module:
    """A model whose adapters act."""
    make, rules = CASES[case]
    torch.manual_seed(seed)
    model = gp.apply(make().eval(), rules)
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        nn.init.normal_(parameter, std=0.2)
    return model


def run(found: Rewrite, part: CapturedGraph, graph: fx.Graph) -> list[torch.Tensor]:
    """A part's graph on the example call that it was captured with."""
    program = found.found.programs[part.path]
    constants = {node.name: value for node, value in program.constants.items()}
    given = iter(tree_leaves(example_call(part.model, None)))
    inputs = [constants[n.name] if n.name in constants else next(given) for n in graph.nodes if n.op == "placeholder"]
    with torch.no_grad(), inactive(found.model):  # an active weight form would show the adapted weight
        return floats(fx.GraphModule(part.model, graph)(*inputs))


@pytest.mark.parametrize("case", sampled(CASES, "llama dora", "llama blora"))
def test_the_shown_graph_computes_what_the_model_does(case: str) -> None:
    model = adapted(case)
    args, kwargs = example_call(model, None)
    with inference_view(model):
        want = floats(model(*args, **kwargs))
        with gp.disabled(model):
            base = floats(model(*args, **kwargs))
    found = rewrite(model)
    (part,) = found.parts
    assert found.absent == ()
    scale = float(max(t.abs().max() for t in want))
    # Sums in another order: the capture takes composite operators apart, and the owners do not.
    assert difference(run(found, part, part.after), want) < 1e-5 * scale
    assert difference(run(found, part, part.before), base) < 1e-5 * scale
    assert difference(want, base) > 1e-3 * scale


def same(one: Any, other: Any, *attributes: str) -> bool:
    nodes = categorical_node_match(attributes, [None] * len(attributes))
    return networkx.is_isomorphic(one, other, nodes, categorical_multiedge_match("port", None))


LOOKS = ("kind", "arguments", "shape", "dtype", "adapter", "role")


@pytest.mark.parametrize("case", ["llama lora", pytest.param("llama dora", marks=pytest.mark.slow), "gpt2 fused"])
def test_an_exported_program_is_rewritten_to_the_same_graph(case: str) -> None:
    """There the whole graph is the owner, and the pass works on it for real."""
    make, rules = CASES[case]
    torch.manual_seed(0)
    model = make(tie_word_embeddings=False).eval()  # a tied weight is read once there, and twice here
    args, kwargs = example_call(model, None)
    with torch.no_grad():  # or what a model computes without gradients is a graph within the graph
        exported = gp.apply(torch.export.export(model, args, kwargs, strict=False), rules)
    one, other = (network(rewrite(each)) for each in (gp.apply(model, rules), exported))
    assert any("adapter" in about for _, about in one.nodes(data=True))
    assert same(one, other, *LOOKS)
    inside = (edge for edge in other.edges(keys=True) if all("adapter" in other.nodes[end] for end in edge[:2]))
    other.remove_edge(*next(inside))
    assert not same(one, other, *LOOKS)


def test_a_lora_branch_is_the_graph_that_its_formula_says() -> None:
    """y + (x Aᵀ) Bᵀ, written down by hand."""
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    gp.apply(model, "path(0):lora(r=2)", inputs=torch.randn(5, 6))
    want = networkx.MultiDiGraph()
    shapes = {"x": "5 × 6", "W": "4 × 6", "b": "4", "A": "2 × 6", "B": "4 × 2", "W2": "3 × 4", "b2": "3"}
    steps = {
        "y": ("linear", "x W b", "5 × 4"),
        "xs": ("reshape", "x", "5 × 6"),
        "h": ("linear", "xs A", "5 × 2"),
        "Bt": ("t", "B", "2 × 4"),
        "rows": ("reshape", "y", "5 × 4"),
        "sum": ("addmm", "rows h Bt", "5 × 4"),
        "like": ("view_as", "sum y", "5 × 4"),
        "relu": ("relu", "like", "5 × 4"),
        "z": ("linear", "relu W2 b2", "5 × 3"),
    }
    for name, shape in shapes.items():
        want.add_node(name, kind="input" if name == "x" else "weight", shape=shape)
    for name, (op, operands, shape) in steps.items():
        want.add_node(name, kind="op", shape=shape, op=op)
        want.add_edges_from((source, name, {"port": str(port)}) for port, source in enumerate(operands.split()))
    want.add_node("out", kind="output")
    want.add_edge("z", "out", port="0.0")
    found = network(rewrite(model, torch.randn(5, 6)))
    for _, about in found.nodes(data=True):
        if about["kind"] != "op":
            del about["op"]
    assert same(found, want, "kind", "op", "shape")
    want.remove_edge("xs", "h")
    want.add_edge("x", "h", port="0")
    assert not same(found, want, "kind", "op", "shape")


def test_removing_merging_and_resting_leave_the_base_graph() -> None:
    model = adapted("llama lora")
    before = network(rewrite(model), adapted=False)
    gp.merge(model)
    assert same(network(rewrite(model)), before, *LOOKS)
    gp.unmerge(model)
    gp.activate(model, None)
    assert same(network(rewrite(model)), before, *LOOKS)
    gp.remove(model)
    assert same(network(rewrite(model)), before, *LOOKS)


def test_parts_that_the_call_does_not_run_stand_beside() -> None:
    model = clip().eval()
    gp.apply(model, "q:lora")
    found = rewrite(model)
    drawn = {
        name for part in found.parts for name in [part.path] if any("graphpeft" in n.meta for n in part.after.nodes)
    }
    assert found.absent == ()
    assert drawn
    graph = network(found)
    sites = {about["site"] for _, about in graph.nodes(data=True) if about.get("adapter")}
    assert sites == {entry.site.weight for entry in gp.plan(clip(), "q:lora").entries}
