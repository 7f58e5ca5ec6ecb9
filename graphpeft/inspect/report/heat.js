"use strict";
// Numbers after training: a map of roles by layers for each measure, the value told on hover, click or focus.

function showHeat(maps) {
  const none = el("p", { class: "quiet" }, "No adapter has numbers yet: the model is plain, or its weights hold no values.");
  byId("numbers").append(...(maps.length ? maps.map(heatMap) : [none]));
}

function heatMap(map) {
  const known = map.values.flat().filter((value) => typeof value === "number");
  const most = Math.max(0, ...known);
  const told = el("output", {}, "Point at a cell for its value.");
  const tell = (event) => {
    const cell = event.target.closest("td");
    if (cell) told.textContent = cell.title;
  };
  const table = el("table", { class: "heat", onpointerover: tell, onfocusin: tell, onclick: tell }, heatHead(map), heatBody(map, most));
  roving(table, "td", heatStep);
  const bar = el("span", { class: "ramp" });
  const legend = el("div", { class: "ramp-legend" }, "0", bar, shown(most), el("span", { class: "cell none" }), "no value", told);
  return el("article", { class: "card wide" }, el("h2", {}, map.measure), el("div", { class: "scroll" }, table), legend);
}

function heatHead(map) {
  // Deep models have no room for every number.
  const every = map.columns.length > 24 ? 5 : 1;
  const cells = map.columns.map((layer, i) => el("th", { scope: "col", "aria-label": `layer ${layer}` }, i % every ? "" : String(layer)));
  return el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "layer"), cells));
}

function heatBody(map, most) {
  const rows = map.rows.map((role, y) => {
    const cells = map.columns.map((layer, x) => heatCell(`${role}, layer ${layer}`, map.values[y][x], most));
    return el("tr", {}, el("th", { scope: "row" }, role), cells);
  });
  return el("tbody", {}, rows);
}

function heatCell(place, value, most) {
  const title = `${place}: ${value === null ? "no value" : shown(value)}`;
  const cell = el("td", { title, "aria-label": title, tabindex: "-1" });
  if (typeof value === "number") cell.style.setProperty("--share", `${most ? (100 * value) / most : 0}%`);
  else cell.className = value === null ? "none" : "odd";
  return cell;
}

function heatStep(cell, key) {
  const row = cell.parentElement;
  const beside = { ArrowRight: cell.nextElementSibling, ArrowLeft: cell.previousElementSibling }[key];
  const line = { ArrowDown: row.nextElementSibling, ArrowUp: row.previousElementSibling }[key];
  const to = beside ?? line?.cells[cell.cellIndex];
  return to?.tagName === "TD" ? to : null;
}
