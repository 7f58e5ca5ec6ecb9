"use strict";
// The table of sites and of skipped weights: filtered as you type, sorted by a heading, a row leads to its node.

const COLUMNS = {
  adapted: [
    ["role", "role"], ["layer", "layer"], ["weight", "weight"], ["rows", "rows"], ["shape", "out × in"],
    ["adapter", "adapter"], ["method", "method"], ["form", "form"], ["rank", "rank"], ["parameters", "parameters"],
    ["update", "‖ΔW‖ / ‖W‖"], ["effective_rank", "eff. rank"], ["gates", "gates"], ["bits", "bits"], ["rule", "rule"],
    ["source", "source"],
  ],
  skipped: [
    ["role", "role"], ["layer", "layer"], ["weight", "weight"], ["shape", "out × in"], ["reason", "reason"], ["source", "source"],
  ],
};
const NUMBERS = new Set(["layer", "rank", "parameters", "update", "effective_rank"]);
const CODE = new Set(["weight", "rule", "source"]);

class SiteTable {
  constructor(sites, skipped, choose) {
    this.lists = { adapted: sites, skipped };
    this.choose = choose;
    byId("show-adapted").textContent = `Adapted ${sites.length.toLocaleString("en")}`;
    byId("show-skipped").textContent = `Skipped ${skipped.length.toLocaleString("en")}`;
    for (const which of ["adapted", "skipped"]) byId(`show-${which}`).addEventListener("click", () => this.show(which));
    byId("filter").addEventListener("input", () => this.filter());
    this.show(sites.length ? "adapted" : "skipped");
  }

  show(which) {
    for (const name of ["adapted", "skipped"]) byId(`show-${name}`).setAttribute("aria-pressed", String(name === which));
    const list = this.lists[which];
    this.sorted = { key: "", up: true };
    this.columns = COLUMNS[which].filter(([key]) => list.some((site) => this.says(site, key)));
    this.rows = list.map((site) => this.row(site));
    const headings = this.columns.map(([key, title]) => this.heading(key, title));
    this.body = el("tbody", {}, this.rows.map((row) => row.element));
    const table = el("table", { class: "sites" }, el("thead", {}, el("tr", {}, headings)), this.body);
    byId("table").replaceChildren(list.length ? table : el("p", { class: "quiet" }, "None."));
    roving(table, "tbody tr", (row, key) => this.step(row, key));
    this.filter();
  }

  /** Whether a column has anything to say of a site: `all` rows is nothing, and so is the only adapter there is. */
  says(site, key) {
    const value = site[key];
    if (key === "adapter" && report.overview.adapters.length === 1) return false;
    return value !== null && value !== undefined && value !== "" && !(key === "rows" && value === "all");
  }

  heading(key, title) {
    const sort = el("button", { onclick: () => this.sort(key) }, title);
    return el("th", { scope: "col", class: NUMBERS.has(key) ? "number" : null, "data-key": key }, sort);
  }

  row(site) {
    const texts = this.columns.map(([key]) => shown(site[key]));
    const cells = this.columns.map(([key], i) => {
      const kind = NUMBERS.has(key) ? "number" : CODE.has(key) ? "code" : null;
      const chip = key === "adapter" ? el("span", { class: `chip a${adapterNumber(site.adapter)}` }, texts[i]) : texts[i];
      return el("td", { class: kind }, chip);
    });
    const go = () => this.choose(site);
    const onkeydown = (event) => { if (event.key === "Enter") go(); };
    const element = el("tr", { tabindex: "-1", title: "Show in the graph", onclick: go, onkeydown }, cells);
    return { site, element, text: texts.join(" ").toLowerCase() };
  }

  step(row, key) {
    const side = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[key];
    let to = side && row[side];
    while (to && to.hidden) to = to[side];
    return to;
  }

  /** Every word must be somewhere in the row. */
  filter() {
    const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of this.rows) {
      row.element.hidden = !words.every((word) => row.text.includes(word));
      count += !row.element.hidden;
    }
    byId("filter-count").textContent = words.length ? `${count} of ${this.rows.length}` : "";
  }

  sort(key) {
    this.sorted = { key, up: this.sorted.key === key ? !this.sorted.up : true };
    const sign = this.sorted.up ? 1 : -1;
    const order = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : shown(a).localeCompare(shown(b), "en"));
    this.rows.sort((a, b) => sign * order(a.site[key], b.site[key]));
    this.body.append(...this.rows.map((row) => row.element));
    for (const th of byId("table").querySelectorAll("th")) {
      th.ariaSort = th.dataset.key !== key ? null : this.sorted.up ? "ascending" : "descending";
    }
  }
}
