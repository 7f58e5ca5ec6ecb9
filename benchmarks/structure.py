"""The structure of a checkout in numbers: rooms, arrows and circles between them, files, lines.

`python benchmarks/structure.py [CHECKOUT]` reads imports as text, those inside of functions too, but not those under
`TYPE_CHECKING`, which no program runs. A room is a folder or a file directly in the package. Before the passes stood in the
package, `passes/` at the top level was imported as `graphpeft.passes`; such checkouts are read alike.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx

PACKAGE = "graphpeft"


def modules(root: Path) -> dict[str, Path]:
    """Every module by its dotted name; the root of the package, which is in no room, left out."""
    found = {}
    for folder, name in ((root / PACKAGE, PACKAGE), (root / "passes", f"{PACKAGE}.passes")):
        if not folder.is_symlink():
            for path in folder.rglob("*.py"):
                parts = path.relative_to(folder).with_suffix("").parts
                found[".".join((name, *(part for part in parts if part != "__init__")))] = path
    return {name: path for name, path in found.items() if name != PACKAGE}


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports from the package when it runs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    skipped = {id(inner) for block in blocks for inner in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def graphs(found: dict[str, Path]) -> tuple[networkx.DiGraph, networkx.DiGraph]:
    """Imports between files, and between rooms."""
    files, rooms = networkx.DiGraph(), networkx.DiGraph()
    for name, path in found.items():
        files.add_node(name)
        rooms.add_node(name.split(".")[1])
        for target in imported(path):
            while target and target not in found:
                target = target.rpartition(".")[0]
            if target and target != name:
                files.add_edge(name, target)
                if name.split(".")[1] != target.split(".")[1]:
                    rooms.add_edge(name.split(".")[1], target.split(".")[1])
    return files, rooms


def circles(graph: networkx.DiGraph) -> list[list[str]]:
    return [sorted(group) for group in networkx.strongly_connected_components(graph) if len(group) > 1]


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]
    found = modules(root)
    files, rooms = graphs(found)
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in found.values())
    print(
        f"{rooms.number_of_nodes()} rooms, {rooms.number_of_edges()} arrows between them; in circles: {circles(rooms) or 'none'}"
    )
    print(f"{len(found)} files, {lines:,} lines; in circles: {circles(files) or 'none'}")
    looking = [path for name, path in found.items() if name.startswith(f"{PACKAGE}.inspect")]
    print(f"inspect/: {sum(len(path.read_text(encoding='utf-8').splitlines()) for path in looking):,} lines of Python")


if __name__ == "__main__":
    main()
