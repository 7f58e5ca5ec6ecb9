"use strict";
// Puts the parts together: tabs, the controls of the graph, and the way from a row of the table to its node.

const TABS = ["overview", "sites", "graph", "numbers"];
const view = new GraphView(report.blocks, (item) => details.show(item));
const details = new Details(byId("details"), view);

function showTab() {
  const wanted = TABS.find((name) => location.hash === `#${name}`) ?? TABS[0];
  for (const name of TABS) byId(name).hidden = name !== wanted;
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const here = tab.hash === `#${wanted}`;
    tab.setAttribute("aria-selected", String(here));
    tab.tabIndex = here ? 0 : -1;
  }
  if (wanted === "graph" && report.blocks.length) view.show(Math.max(view.number, 0));
}

function openTab(name) {
  if (location.hash !== `#${name}`) history.pushState(null, "", `#${name}`);
  showTab();
  scrollTo(0, 0);
}

function goTo(site) {
  openTab("graph");
  view.show(site.block);
  if (site.node !== null) view.reveal(site.node);
}

function showLegend() {
  const owners = report.overview.adapters.map((one) => [`swatch a${adapterNumber(one.name)}`, `adapter ${one.name}`]);
  const kinds = [["swatch role", "weight with a role"], ["swatch", "operator"], ["swatch shut", "closed module"], ["swatch boundary", "enters or leaves"]];
  const changes = [["swatch added compared", "added"], ["swatch removed compared", "removed"]];
  byId("legend").append(...[...owners, ...kinds, ...changes].map(([style, text]) => el("li", { class: style }, text)));
}

function wireTabs() {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    tab.addEventListener("click", (event) => {
      event.preventDefault();
      openTab(tab.hash.slice(1));
    });
  }
  roving(document.querySelector("[role=tablist]"), "[role=tab]", (tab, key) => {
    return { ArrowRight: tab.nextElementSibling, ArrowLeft: tab.previousElementSibling }[key];
  });
  addEventListener("popstate", showTab);
}

function wireGraph() {
  byId("block").append(...report.blocks.map((block, i) => el("option", { value: i }, block.label)));
  byId("block").addEventListener("change", (event) => view.show(Number(event.target.value)));
  byId("compare").addEventListener("change", (event) => {
    document.body.classList.toggle("comparing", event.target.checked);
    view.setCompare(event.target.checked);
  });
  byId("held").addEventListener("change", (event) => view.setHeld(event.target.checked));
  const clicks = {
    expand: () => view.toggleAll(true), collapse: () => view.toggleAll(false), fit: () => view.fit(),
    "zoom-in": () => view.zoom(1.25), "zoom-out": () => view.zoom(0.8),
  };
  for (const [id, act] of Object.entries(clicks)) byId(id).addEventListener("click", act);
  byId("find").addEventListener("input", (event) => {
    const count = view.find(event.target.value);
    byId("find-count").textContent = event.target.value.trim() ? `${count} found${count ? ", Enter for the next" : ""}` : "";
  });
  byId("find").addEventListener("keydown", (event) => {
    if (event.key === "Enter") view.next(event.shiftKey ? -1 : 1);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (view.number >= 0) view.draw(); });
}

showOverview(report.overview);
showHeat(report.heat);
new SiteTable(report.sites, report.skipped, goTo);
showLegend();
wireTabs();
wireGraph();
showTab();
document.body.dataset.ready = "true";
