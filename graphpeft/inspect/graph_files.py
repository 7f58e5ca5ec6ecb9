"""Write graphs for other tools: DOT for Graphviz, GraphML for yEd and Gephi, JSON for scripts and `diff`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphpeft.errors import FileError
from graphpeft.files.atomic import write

if TYPE_CHECKING:
    from networkx import MultiDiGraph

FORMATS = (".dot", ".graphml", ".json")
COLORS = {"input": "#e8eef7", "weight": "#f2f2f2", "constant": "#f2f2f2", "output": "#e8eef7", "op": "#ffffff"}
ADAPTER = "#ffd9a8"


def write_graph(graph: MultiDiGraph[str], path: str | os.PathLike[str]) -> None:
    """Write a graph from `to_networkx`, in the format of the path's suffix. The file appears complete or not at all.

    Raises `FileError` for an unknown suffix.
    """
    import networkx

    path = Path(path)
    if path.suffix not in FORMATS:
        raise FileError(f"{path}: there is no graph format with the suffix {path.suffix!r}. Use {', '.join(FORMATS)}.")
    if path.suffix == ".json":
        text = json.dumps(networkx.node_link_data(graph, edges="edges"), indent=1, ensure_ascii=False) + "\n"
    elif path.suffix == ".graphml":
        text = "\n".join(networkx.generate_graphml(graph)) + "\n"
    else:
        text = dot(graph)
    write(path, text.encode())


def read_graph(path: Path) -> MultiDiGraph[str]:
    """A graph from a `.json` file of `write_graph`. Raises `FileError`."""
    import networkx

    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        graph = networkx.node_link_graph(given, edges="edges", directed=True, multigraph=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, networkx.NetworkXError) as error:
        raise FileError(
            f"{path} does not hold a graph: {error}. Write one with `graphpeft graph MODEL {path.name}`."
        ) from error
    if any("kind" not in about or "op" not in about for _, about in graph.nodes(data=True)):
        raise FileError(f"{path} holds a graph that graphpeft did not write: its nodes lack `kind` and `op`.")
    return graph


def dot(graph: MultiDiGraph[str]) -> str:
    """The graph in Graphviz's language, with modules as nested clusters and adapters in color."""
    import pydot

    root = pydot.Dot("graph", graph_type="digraph", rankdir="TB", fontname="sans-serif")
    root.set_node_defaults(shape="box", style="filled,rounded", fontname="sans-serif", fontsize="10")
    clusters: dict[str, Any] = {"": root}
    ids = {name: f"n{number}" for number, name in enumerate(graph)}
    for name, about in graph.nodes(data=True):
        lines = [about["op"], *(about[key] for key in ("weight", "shape") if about.get(key))]
        color = ADAPTER if "adapter" in about else COLORS[about["kind"]]
        label = _quoted("\n".join(lines))
        _cluster(clusters, about.get("path", "")).add_node(pydot.Node(ids[name], label=label, fillcolor=_quoted(color)))
    for source, target, port in graph.edges(data="port"):
        root.add_edge(pydot.Edge(ids[source], ids[target], headlabel=_quoted(port), labelfontsize="7"))
    return str(root.to_string())


def _cluster(clusters: dict[str, Any], path: str) -> Any:
    """A module's cluster, nested in its parents' clusters."""
    import pydot

    if path not in clusters:
        parent = path.rpartition(".")[0]
        number = len(clusters)
        made = pydot.Cluster(f"c{number}", label=_quoted(path), color=_quoted("#c0c0c0"), fontsize="9")
        _cluster(clusters, parent).add_subgraph(made)
        clusters[path] = made
    return clusters[path]


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
