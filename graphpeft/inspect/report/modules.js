"use strict";
// A block's graph as the tree of its modules, and what is to be seen of it when some of them are closed.

const HELD = new Set(["weight", "constant"]);

/** Both graphs as one: nodes of one id are the same. Each node and edge knows in which of them it is. */
function union(before, after) {
  const nodes = new Map();
  const edges = new Map();
  for (const [side, graph] of [["after", after], ["before", before]]) {
    for (const node of graph.nodes) nodes.set(node.id, { node, ...nodes.get(node.id), [side]: true });
    for (const edge of graph.edges) {
      const key = JSON.stringify([edge.from, edge.to, edge.port]);
      edges.set(key, { ...edge, ...edges.get(key), [side]: true });
    }
  }
  return { nodes, edges: [...edges.values()] };
}

/** Items: a leaf for each node, a group for each module that holds several. */
function moduleTree(entries) {
  const root = { id: "", path: "", group: true, children: [], parts: new Map() };
  for (const entry of entries) {
    let at = root;
    for (const part of entry.node.module ? entry.node.module.split(".") : []) {
      if (!at.parts.has(part)) {
        const path = at.path ? `${at.path}.${part}` : part;
        const made = { id: `module ${path}`, path, group: true, children: [], parts: new Map() };
        at.parts.set(part, made);
        at.children.push(made);
      }
      at = at.parts.get(part);
    }
    at.children.push({ id: entry.node.id, path: entry.node.module, group: false, ...entry });
  }
  return adopted({ ...root, children: root.children.map(folded) }, null);
}

/** A module that holds one thing is that thing. */
function folded(item) {
  if (!item.group) return item;
  return item.children.length === 1 ? folded(item.children[0]) : { ...item, children: item.children.map(folded) };
}

function adopted(item, parent) {
  item.parent = parent;
  for (const child of item.children ?? []) adopted(child, item);
  item.leaves = item.group ? item.children.flatMap((child) => child.leaves) : [item];
  const names = new Set(item.leaves.map((leaf) => leaf.node.adapter));
  item.adapter = names.size === 1 ? [...names][0] : "";
  item.before = item.leaves.some((leaf) => leaf.before);
  item.after = item.leaves.some((leaf) => leaf.after);
  item.within = parent?.path ? item.path.slice(parent.path.length + 1) : item.path;
  return item;
}

function* ancestors(item) {
  for (let at = item.parent; at; at = at.parent) yield at;
}

function* groups(item) {
  for (const child of item.children ?? []) {
    if (child.group) yield child;
    yield* groups(child);
  }
}

/** At first modules are open that hold an adapter, and a module that is nearly the whole block. */
function opening(root) {
  const top = root.children.filter((child) => child.group);
  const held = [...groups(root)].filter((group) => group.leaves.some((leaf) => leaf.node.adapter));
  return new Set([...held, ...(top.length === 1 ? top : [])].map((group) => group.path));
}

/** The item that stands for each leaf: itself, or the outermost closed module around it. */
function standIns(root, open) {
  const found = new Map();
  const visit = (item, closed) => {
    const shut = closed ?? (item.group && item.parent && !open.has(item.path) ? item : null);
    if (!item.group) found.set(item.id, shut ?? item);
    else for (const child of item.children) visit(child, shut);
  };
  visit(root, null);
  return found;
}

/** Edges between what is seen: those that connect the same two are one. */
function seenEdges(edges, stand) {
  const merged = new Map();
  for (const edge of edges) {
    const from = stand.get(edge.from);
    const to = stand.get(edge.to);
    if (!from || !to || from === to) continue;
    const key = JSON.stringify([from.id, to.id]);
    const one = merged.get(key) ?? { from, to, before: false, after: false };
    one.before ||= Boolean(edge.before);
    one.after ||= Boolean(edge.after);
    merged.set(key, one);
  }
  return [...merged.values()];
}
