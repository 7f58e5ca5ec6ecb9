"use strict";
// The panel beside the graph: all that is known of the chosen node or module, and ways to its neighbours.

class Details {
  constructor(root, view) {
    this.root = root;
    this.view = view;
  }

  show(item) {
    if (!item) return this.root.replaceChildren(...this.nothing());
    this.root.replaceChildren(...(item.group ? this.module(item) : this.node(item)));
    this.root.scrollTop = 0;
  }

  nothing() {
    const help = [
      "Click a node for its shape, source, rule and neighbours.",
      "Click the sign on a module, or double-click it, to open or close it.",
      "Keys on the graph: arrows walk along edges, Enter opens, + − 0 zoom.",
    ];
    return [el("h2", {}, "Nothing chosen"), ...help.map((text) => el("p", { class: "quiet" }, text))];
  }

  node(item) {
    const { node } = item;
    const known = {
      kind: node.kind === "op" ? null : node.kind, shape: node.shape, dtype: node.dtype,
      arguments: /^[%, ]*$/.test(node.arguments ?? "") ? null : node.arguments,
      module: node.path, type: node.type, source: node.source, code: node.code, weight: node.weight, role: node.role,
      rule: node.rule, method: node.method, adapter: node.adapter,
    };
    return [
      el("h2", {}, titleOf(node), this.change(item)), this.facts(known), this.sites(item),
      this.links("Inputs", this.inputs([item])), this.links("Users", this.users([item])),
    ].filter(Boolean);
  }

  module(item) {
    const node = item.leaves.find((leaf) => leaf.node.module === item.path)?.node;
    const open = this.view.open.has(item.path);
    const known = {
      module: node?.path ?? item.path, type: typeOf(item), operators: String(item.leaves.filter((l) => l.node.kind === "op").length),
      ...(item.adapter && { rule: node?.rule, method: node?.method, adapter: item.adapter, source: node?.source }),
    };
    return [
      el("h2", {}, item.adapter || item.within, this.change(item)), this.facts(known),
      el("button", { onclick: () => this.view.toggle(item.id) }, open ? "Close" : "Open"), this.sites(item),
      this.links("Inputs", this.inputs(item.leaves)), this.links("Users", this.users(item.leaves)),
    ].filter(Boolean);
  }

  change(item) {
    if (!this.view.compare || item.before === item.after) return null;
    return el("span", { class: item.after ? "good" : "bad" }, item.after ? "added" : "removed");
  }

  facts(known) {
    const pairs = Object.entries(known).filter(([, value]) => value);
    const text = (name, value) => (["shape", "dtype", "role", "operators", "kind"].includes(name) ? value : el("code", {}, value));
    return el("dl", {}, pairs.map(([name, value]) => [el("dt", {}, name), el("dd", {}, text(name, value))]).flat());
  }

  /** The numbers of every layer that this picture stands for. */
  sites(item) {
    const found = this.sitesOf(item);
    if (!found.length) return null;
    const columns = [["layer", "layer"], ["adapter", "adapter"], ["rank", "rank"], ["parameters", "params"], ["update", "‖ΔW‖/‖W‖"],
      ["effective_rank", "eff. rank"], ["gates", "gates"], ["bits", "bits"]];
    const told = columns.filter(([key]) => found.some((site) => shown(site[key]) !== "") && !(item.adapter && key === "adapter"));
    const titles = told.map(([, title]) => title);
    const table = grid(titles, found.map((site) => told.map(([key]) => shown(site[key]))), titles);
    return el("section", {}, el("h3", {}, `Sites (${found.length})`), el("div", { class: "scroll small" }, table));
  }

  sitesOf(item) {
    const block = this.view.blocks[this.view.number];
    const nodes = new Map(block.after.nodes.map((node) => [node.id, node]));
    const own = item.leaves.map((leaf) => leaf.node);
    const here = report.sites.filter((site) => site.block === this.view.number && nodes.has(site.node));
    return here.filter((site) => {
      const at = nodes.get(site.node);
      if (item.adapter) return at.adapter === item.adapter && at.module === own[0].module;
      return !item.group && (site.node === item.id || (own[0].weight && own[0].weight === at.site && own[0].role));
    });
  }

  /** Values that come from outside of these leaves. */
  inputs(leaves) {
    return this.crossing(leaves, "to", "from");
  }

  users(leaves) {
    return this.crossing(leaves, "from", "to");
  }

  crossing(leaves, here, there) {
    const ids = new Set(leaves.map((leaf) => leaf.id));
    const sides = this.view.compare ? ["after", "before"] : ["after"];
    const crossing = this.view.edges.filter((edge) => sides.some((side) => edge[side]) && ids.has(edge[here]) && !ids.has(edge[there]));
    return crossing.map((edge) => ({ id: edge[there], port: edge.port }));
  }

  links(title, ends) {
    if (!ends.length) return null;
    const block = this.view.blocks[this.view.number];
    const nodes = new Map([...block.before.nodes, ...block.after.nodes].map((node) => [node.id, node]));
    const link = ({ id, port }) => {
      const node = nodes.get(id);
      const text = [titleOf(node), HELD.has(node.kind) ? node.module : node.shape].filter(Boolean).join("  ");
      return el("li", {}, el("span", { class: "port", title: "port" }, port), el("button", { class: "link", onclick: () => this.view.reveal(id) }, text));
    };
    return el("section", {}, el("h3", {}, `${title} (${ends.length})`), el("ul", { class: "ends" }, ends.map(link)));
  }
}
