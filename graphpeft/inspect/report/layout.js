"use strict";
// Where everything stands. dagre lays out each open module by itself, as a box that is a node of the module around it;
// an edge that crosses a box's border does so at a gate there, one for each value, so that lines keep out of other boxes.

const SPACE = { side: 14, top: 34, bottom: 12 };

/** Where items are, by id as `{x, y, width, height}` of their middle; points of edges; and how much room all of it takes. */
function placed(root, open, edges, size) {
  const hops = new Map();
  const at = (group) => {
    if (!hops.has(group)) hops.set(group, []);
    return hops.get(group);
  };
  for (const edge of edges) edge.hops = hopsOf(edge, at);
  const made = boxed(root, open, hops, size);
  const boxes = new Map();
  settle(root, made, 0, 0, boxes);
  for (const edge of edges) edge.points = pointsOf(edge, boxes);
  return { boxes, edges, left: made.shift.x, top: made.shift.y, width: made.content, height: made.inside };
}

/** An edge's way: out of the boxes around its source, across, and into those around its target. */
function hopsOf(edge, at) {
  const [out, into] = [[...ancestors(edge.from)], [...ancestors(edge.to)]];
  const shared = out.find((group) => into.includes(group));
  const leaving = out.slice(0, out.indexOf(shared));
  const entering = into.slice(0, into.indexOf(shared)).reverse();
  const way = [];
  const hop = (group, from, to) => {
    const key = `${from} ${to}`;
    let one = at(group).find((each) => each.key === key);
    if (!one) at(group).push((one = { key, group, from, to }));
    way.push(one);
  };
  let from = edge.from.id;
  for (const group of leaving) {
    hop(group, from, `out ${edge.from.id}`);
    from = group.id;
  }
  hop(shared, from, entering[0]?.id ?? edge.to.id);
  entering.forEach((group, i) => hop(group, `in ${edge.from.id}`, entering[i + 1]?.id ?? edge.to.id));
  return way;
}

/** A module's inside, laid out. Its size is known before the module around it is. */
function boxed(group, open, hops, size) {
  const graph = new dagre.graphlib.Graph({ multigraph: true });
  graph.setGraph({ rankdir: "TB", rankalign: "top", nodesep: 18, edgesep: 12, ranksep: 24 });
  graph.setDefaultEdgeLabel(() => ({}));
  const inner = new Map();
  for (const child of group.children) {
    const isOpen = child.group && open.has(child.path);
    if (isOpen) inner.set(child.id, boxed(child, open, hops, size));
    const own = size(child, isOpen);
    const made = inner.get(child.id);
    if (made) made.width = Math.max(made.width, own.width);
    graph.setNode(`= ${child.id}`, made ? { width: made.width, height: made.height } : own);
  }
  const ends = (hop) => [hop.from, hop.to].map((id) => (inner.has(id) || graph.hasNode(`= ${id}`) ? `= ${id}` : gate(graph, id)));
  for (const hop of hops.get(group) ?? []) {
    hop.ends = ends(hop);
    graph.setEdge(...hop.ends, { weight: hop.ends[0].startsWith("in ") ? 3 : 1 }, hop.key); // what reads an input stands high
  }
  dagre.layout(graph);
  return sized(graph, inner);
}

/** Gates stand at the very top and the very bottom of their box. */
function gate(graph, id) {
  if (graph.hasNode(id)) return id;
  const enters = id.startsWith("in ");
  const wall = enters ? "top" : "bottom";
  graph.setNode(wall, { width: 0, height: 0 });
  graph.setNode(id, { width: 10, height: 1 });
  graph.setEdge(...(enters ? [wall, id] : [id, wall]), { weight: 8 }, "wall");
  return id;
}

function sized(graph, inner) {
  const { width, height } = graph.graph();
  const above = graph.hasNode("top") ? SPACE.top - 24 : SPACE.top; // the wall's rank is space enough
  const below = graph.hasNode("bottom") ? 0 : SPACE.bottom;
  const shift = { x: SPACE.side, y: above };
  const outer = { width: width + 2 * SPACE.side, height: height + above + below };
  return { graph, inner, shift, content: width, inside: height, ...outer };
}

/** From each box's own coordinates to the page's; a group's hops get their points here. */
function settle(group, made, left, top, boxes) {
  const x = left + made.shift.x + Math.max(0, made.width - made.content - 2 * SPACE.side) / 2;
  const y = top + made.shift.y;
  for (const child of group.children) {
    const node = made.graph.node(`= ${child.id}`);
    if (!node) continue;
    boxes.set(child.id, { x: node.x + x, y: node.y + y, width: node.width, height: node.height });
    const inside = made.inner.get(child.id);
    if (inside) settle(child, inside, node.x + x - node.width / 2, node.y + y - node.height / 2, boxes);
  }
  group.routes = (hop) => made.graph.edge(hop.ends[0], hop.ends[1], hop.key).points.map((p) => ({ x: p.x + x, y: p.y + y }));
}

/** The hops' points in a row: out at the bottom, straight through the gates and past tall boxes, in at the top. */
function pointsOf(edge, boxes) {
  const ways = edge.hops.map((hop) => hop.group.routes(hop));
  ways.slice(1).forEach((next, i) => {
    const way = ways[i];
    if (edge.hops[i + 1].from.startsWith("in ")) way.at(-1).x = next[0].x;
    else next[0].x = way.at(-1).x;
  });
  const points = ways.flat();
  docked(points[0], points[1], boxes.get(edge.from.id), 1);
  docked(points.at(-1), points.at(-2), boxes.get(edge.to.id), -1);
  return straightened(points.flatMap((point, i) => steep(point, points[i + 1])));
}

function docked(end, next, box, side) {
  const room = box.width / 2 - 12;
  end.x = Math.min(Math.max(next.x, box.x - room), box.x + room);
  end.y = box.y + (side * box.height) / 2;
}

/** A line turns aside only between two ranks, for boxes beside it may be taller than where it begins. */
function steep(point, next) {
  return next && next.y - point.y > 34 ? [point, { x: point.x, y: next.y - 10 }] : [point];
}

function straightened(points) {
  const kept = [];
  points.forEach((point, i) => {
    const [a, b] = [kept.at(-1), points[i + 1]];
    if (!a || !b) return void kept.push(point);
    const [dx, dy] = [b.x - a.x, b.y - a.y];
    const length = Math.hypot(dx, dy);
    const off = length ? Math.abs((point.x - a.x) * dy - (point.y - a.y) * dx) / length : 0;
    if (off > 0.5) kept.push(point);
  });
  return kept;
}
