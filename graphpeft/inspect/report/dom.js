"use strict";
// Making elements. Text from the data becomes text nodes only, never markup.

const report = JSON.parse(document.getElementById("data").textContent);

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

const byId = (id) => document.getElementById(id);

/** Numbers to three digits, whole ones with separators; what is unknown as nothing. */
function shown(value) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return String(Number(value.toPrecision(3)));
}

/** A table with headings. Cells are text, or elements made by the caller. */
function grid(headings, rows, right = []) {
  const side = (i) => (right.includes(headings[i]) ? "number" : null);
  const head = el("tr", {}, headings.map((text, i) => el("th", { scope: "col", class: side(i) }, text)));
  const body = rows.map((row) => el("tr", {}, row.map((cell, i) => el("td", { class: side(i) }, cell))));
  return el("table", {}, el("thead", {}, head), el("tbody", {}, body));
}

/** Of many elements one can be reached with Tab; arrows go on from there. `step` gives the neighbour for a key. */
function roving(container, selector, step) {
  const first = container.querySelector(selector);
  if (first) first.tabIndex = 0;
  container.addEventListener("keydown", (event) => {
    const from = event.target.closest(selector);
    const to = from && step(from, event.key);
    if (!to) return;
    event.preventDefault();
    from.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  });
}

/** Which colour stands for which adapter: their order decides. */
function adapterNumber(name) {
  const known = report.overview.adapters.findIndex((one) => one.name === name);
  return (known < 0 ? 0 : known) % 6;
}
