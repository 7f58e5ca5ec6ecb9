"use strict";
// One block at a time on one pane or, before and after, on two that move together and place equal nodes alike.

const CLEAR = 0.75; // below this labels are hard to read

class GraphView {
  constructor(blocks, told) {
    this.blocks = blocks;
    this.told = told;
    this.panes = {};
    this.compare = this.held = false;
    this.number = -1;
    this.seen = new Map(); // open modules by block, so that a block looks as it was left
  }

  /** Draw a block, unless it is there. */
  show(number) {
    if (number === this.number) return;
    this.number = number;
    this.chosen = null;
    this.found = [];
    byId("block").value = String(number);
    this.build();
    this.draw();
    this.home();
    this.told(null);
  }

  build() {
    const { before, after } = this.blocks[this.number];
    const both = union(this.compare ? before : { nodes: [], edges: [] }, after);
    const entries = [...both.nodes.values()].filter(({ node }) => this.held || !HELD.has(node.kind));
    this.edges = both.edges;
    this.root = moduleTree(entries);
    this.items = new Map([...groups(this.root), ...this.root.leaves].map((item) => [item.id, item]));
    if (!this.seen.has(this.number)) this.seen.set(this.number, opening(this.root));
    this.open = this.seen.get(this.number);
  }

  draw() {
    this.stand = standIns(this.root, this.open);
    const size = (item, open) => this.size(item, open);
    this.layout = placed(this.root, this.open, seenEdges(this.edges, this.stand), size);
    for (const side of this.compare ? ["before", "after"] : ["after"]) this.fill(side);
    this.mark();
  }

  size(item, open) {
    return { width: Math.max(48, Math.ceil(textWidth(labelOf(item)) + (item.group ? 54 : 22))), height: open ? 0 : 38 };
  }

  fill(side) {
    const cy = (this.panes[side] ??= this.pane(side));
    const elements = [];
    for (const [id, box] of this.layout.boxes) {
      const item = this.items.get(id);
      if (item[side]) elements.push(this.node(item, box));
    }
    this.layout.edges.forEach((edge, i) => { if (edge[side]) elements.push(this.edge(edge, i)); });
    cy.batch(() => {
      cy.elements().remove();
      cy.style(stylesheet());
      cy.add(elements);
    });
  }

  node(item, box) {
    const open = item.group && this.open.has(item.path);
    const data = {
      id: item.id, label: labelOf(item), width: box.width, height: box.height, depth: [...ancestors(item)].length,
      colour: colour(`--a${adapterNumber(ownerOf(item))}`), sign: item.group ? sign(open) : "",
      indent: 28 - box.width, // an open module's name stands beside its sign
    };
    return { group: "nodes", data, position: { x: box.x, y: box.y }, classes: this.classes(item, open).join(" ") };
  }

  classes(item, open) {
    const kind = item.node?.kind;
    const known = {
      group: item.group, open, adapter: item.adapter, held: HELD.has(kind), boundary: kind === "input" || kind === "output",
      role: kind === "op" && item.node.role && !item.adapter,
      added: this.compare && !item.before && !open, removed: this.compare && !item.after,
    };
    return Object.keys(known).filter((name) => known[name]);
  }

  edge({ from, to, points }, number) {
    const end = (item, point) => {
      const box = this.layout.boxes.get(item.id);
      return [point.x - box.x, point.y - box.y];
    };
    const data = {
      id: `edge ${number}`, source: from.id, target: to.id, start: end(from, points[0]), end: end(to, points.at(-1)), ...bends(points),
    };
    return { group: "edges", data, classes: points.length > 2 ? "bent" : "" };
  }

  pane(side) {
    const container = byId(side).querySelector(".canvas");
    const cy = cytoscape({ container, minZoom: 0.05, maxZoom: 3, autoungrabify: true, autounselectify: true, boxSelectionEnabled: false });
    cy.on("tap", "node", (event) => this.tap(event));
    cy.on("dbltap", "node.group", (event) => this.toggle(event.target.id()));
    cy.on("tap", (event) => { if (event.target === cy) this.choose(null); });
    cy.on("viewport", () => this.follow(cy));
    container.addEventListener("keydown", (event) => this.key(event));
    return cy;
  }

  /** The other pane looks at the same place. */
  follow(cy) {
    if (this.following || !this.compare) return;
    this.following = true;
    for (const other of Object.values(this.panes)) if (other !== cy) other.viewport({ zoom: cy.zoom(), pan: { ...cy.pan() } });
    this.following = false;
  }

  tap({ target, position }) {
    const box = this.layout.boxes.get(target.id());
    const onSign = target.hasClass("group") && position.x - box.x + box.width / 2 < 25 && position.y - box.y + box.height / 2 < 26;
    if (onSign) this.toggle(target.id());
    else this.choose(target.id());
  }

  toggle(id) {
    const { path } = this.items.get(id);
    const was = this.layout.boxes.get(id);
    if (!this.open.delete(path)) this.open.add(path);
    this.draw();
    const now = this.layout.boxes.get(id);
    const { after } = this.panes; // the box's corner stays where it is on the screen
    const corner = (box) => ({ x: box.x - box.width / 2, y: box.y - box.height / 2 });
    after.panBy({ x: (corner(was).x - corner(now).x) * after.zoom(), y: (corner(was).y - corner(now).y) * after.zoom() });
    this.choose(id);
  }

  toggleAll(open) {
    this.open.clear();
    if (open) for (const group of groups(this.root)) this.open.add(group.path);
    this.draw();
    this.home();
    this.choose(null);
  }

  choose(id) {
    this.chosen = id;
    this.mark();
    this.told(id === null ? null : this.items.get(id));
  }

  /** Open what a node is in, choose it and bring it to the middle. */
  reveal(id) {
    if (!this.items.has(id) && this.blocks[this.number].after.nodes.some((node) => node.id === id)) this.setHeld(true);
    const item = this.items.get(id);
    if (!item) return;
    const shut = [...ancestors(item)].filter((group) => group.parent && !this.open.has(group.path));
    for (const group of shut) this.open.add(group.path);
    if (shut.length) this.draw();
    this.choose(id);
    const { after } = this.panes;
    after.zoom(Math.max(after.zoom(), CLEAR));
    after.center((item.after ? after : this.panes.before).getElementById(id));
  }

  mark() {
    const found = new Set(this.found.map((id) => this.stand.get(id)?.id));
    for (const cy of Object.values(this.panes)) {
      cy.batch(() => {
        cy.elements().removeClass("chosen near found");
        cy.nodes().filter((node) => found.has(node.id())).addClass("found");
        const chosen = this.chosen === null ? cy.collection() : cy.getElementById(this.chosen);
        chosen.addClass("chosen").connectedEdges().addClass("near");
      });
    }
  }

  /** Every word must be in what is known of a node. Returns how many there are. */
  find(text) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    const known = ({ node }) => ["op", "module", "path", "type", "adapter", "role", "weight", "source"].map((key) => node[key]).join(" ").toLowerCase();
    const hits = words.length ? this.root.leaves.filter((leaf) => words.every((word) => known(leaf).includes(word))) : [];
    this.found = hits.map((leaf) => leaf.id);
    this.at = -1;
    this.mark();
    const first = this.stand.get(this.found[0]);
    if (first) this.panes.after.center(this.panes.after.getElementById(first.id));
    return this.found.length;
  }

  next(step) {
    if (!this.found.length) return;
    this.at = (Math.max(this.at, step < 0 ? 0 : -1) + step + this.found.length) % this.found.length;
    this.reveal(this.found[this.at]);
  }

  setHeld(held) {
    this.held = byId("held").checked = held;
    this.build();
    this.draw();
  }

  setCompare(compare) {
    this.compare = compare;
    byId("before").hidden = byId("after").querySelector("figcaption").hidden = !compare;
    this.build();
    this.draw();
    for (const cy of Object.values(this.panes)) cy.resize();
    this.home();
    if (this.chosen !== null && !this.items.has(this.chosen)) this.choose(null);
  }

  /** Where reading begins: the top, at a size that can be read. */
  home() {
    const cy = this.panes.after;
    const { left, top, width, height } = this.layout;
    const zoom = Math.min(1, Math.max(CLEAR, Math.min((cy.width() - 40) / width, (cy.height() - 60) / height)));
    const x = Math.max(20, (cy.width() - width * zoom) / 2) - left * zoom;
    cy.viewport({ zoom, pan: { x, y: (this.compare ? 40 : 20) - top * zoom } });
    this.follow(cy);
  }

  fit() {
    this.panes.after.fit(undefined, 20);
  }

  zoom(factor) {
    const cy = this.panes.after;
    cy.zoom({ level: cy.zoom() * factor, renderedPosition: { x: cy.width() / 2, y: cy.height() / 2 } });
  }

  key(event) {
    const chosen = this.chosen === null ? null : this.panes.after.getElementById(this.chosen);
    const go = (nodes) => { if (nodes?.nonempty()) this.reveal(nodes[0].id()); };
    const keys = {
      "+": () => this.zoom(1.2), "-": () => this.zoom(1 / 1.2), 0: () => this.fit(), Escape: () => this.choose(null),
      ArrowDown: () => go(chosen ? chosen.outgoers("node") : this.topmost()),
      ArrowUp: () => go(chosen?.incomers("node")),
      ArrowRight: () => go(this.beside(chosen, 1)),
      ArrowLeft: () => go(this.beside(chosen, -1)),
      Enter: () => { if (this.items.get(this.chosen)?.group) this.toggle(this.chosen); },
    };
    if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    keys[event.key]();
  }

  topmost() {
    return this.panes.after.nodes().not(".open").sort((a, b) => a.position("y") - b.position("y"));
  }

  /** The nearest of what reads the same values. */
  beside(chosen, side) {
    const others = chosen?.incomers("node").outgoers("node").not(chosen).filter((n) => side * (n.position("x") - chosen.position("x")) > 0);
    return others?.sort((a, b) => side * (a.position("x") - b.position("x")));
  }
}

function short(text) {
  return text.length > 44 ? `${text.slice(0, 43)}…` : text;
}

/** What stands on a box: what it is, and below it the shape, or the class of the module. */
function labelOf(item) {
  if (item.group) return short(item.adapter ? adapterLabel(item) : [item.within, typeOf(item)].filter(Boolean).join("  "));
  const { node } = item;
  return [short([titleOf(node), node.kind === "op" && !item.adapter ? item.within : ""].filter(Boolean).join("  ")), node.shape].filter(Boolean).join("\n");
}

function adapterLabel(item) {
  const { method } = item.leaves[0].node;
  return method ? `${item.adapter}  ${method}` : item.adapter;
}

/** A value that enters or leaves is called after the module that made it; a block's own number says nothing. */
function titleOf(node) {
  return node.kind !== "op" && /^\d+$/.test(node.op) && node.path ? node.path.split(".").slice(-2).join(".") : node.op;
}

function typeOf(item) {
  return item.leaves.find((leaf) => leaf.node.module === item.path && leaf.node.type)?.node.type ?? "";
}

function ownerOf(item) {
  const node = item.leaves[0].node;
  return node.of || node.adapter.split(".")[0];
}
