"""Graphs in files: what other tools read is what the graph says."""

from __future__ import annotations

from pathlib import Path

import networkx
import pydot
import pyparsing
import pytest
from zoo import llama

import graphpeft as gp
from graphpeft.errors import FileError
from graphpeft.inspect.graph_files import write_graph
from graphpeft.inspect.graph_model import Node


@pytest.fixture(scope="module")
def graph() -> networkx.MultiDiGraph:
    return gp.to_networkx(gp.apply(llama(layers=1), "qv:lora"), values=True)


def test_attributes_are_plain_and_declared(graph: networkx.MultiDiGraph) -> None:
    known = Node.__annotations__
    for _, about in graph.nodes(data=True):
        assert set(about) <= set(known)
        assert all(type(value) is (int if "int" in str(known[name]) else str) for name, value in about.items())
    assert {about["source"].partition(":")[0] for _, about in graph.nodes(data=True) if about.get("role") == "q"} == {
        "modeling_llama.py"
    }
    ports = {port for *_, port in graph.edges(data="port")}
    assert {"0", "1", "0.1"} <= ports


def test_json_comes_back(graph: networkx.MultiDiGraph, tmp_path: Path) -> None:
    write_graph(graph, tmp_path / "graph.json")
    again = gp.to_networkx(tmp_path / "graph.json")
    assert networkx.utils.graphs_equal(graph, again)
    assert list(graph) == list(again)
    assert not gp.diff(graph, tmp_path / "graph.json")


def test_graphml_comes_back(graph: networkx.MultiDiGraph, tmp_path: Path) -> None:
    write_graph(graph, tmp_path / "graph.graphml")
    again = networkx.read_graphml(tmp_path / "graph.graphml", force_multigraph=True)
    assert dict(again.nodes(data=True)) == dict(graph.nodes(data=True))
    assert sorted(again.edges(data="port")) == sorted(graph.edges(data="port"))


def test_dot_has_modules_as_clusters(graph: networkx.MultiDiGraph, tmp_path: Path) -> None:
    pyparsing.ParserElement.enable_packrat(None)  # boxes in boxes take pydot ten times as long without
    write_graph(graph, tmp_path / "graph.dot")
    (drawn,) = pydot.graph_from_dot_file(str(tmp_path / "graph.dot"))
    assert len(drawn.get_edges()) == graph.number_of_edges()
    labels, nodes, waiting = set(), 0, [drawn]
    while waiting:
        here = waiting.pop()
        labels.add((here.get_label() or "").strip('"'))
        nodes += sum(node.get_name() not in {"node", "edge", "graph"} for node in here.get_nodes())
        waiting += here.get_subgraphs()
    assert nodes == len(graph)
    assert "model.layers.0.self_attn.q_proj.adapters.default.q" in labels


def test_bad_files(graph: networkx.MultiDiGraph, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"no graph format.*\.svg.*Use \.dot, \.graphml, \.json"):
        write_graph(graph, tmp_path / "graph.svg")
    assert list(tmp_path.iterdir()) == []
    for text in ("", "{}", "[1]", '{"nodes": [{"id": "a"}], "edges": []}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(FileError, match=r"does not hold a graph|holds a graph that graphpeft did not write"):
            gp.to_networkx(tmp_path / "bad.json")
