"use strict";
// How the graph looks. Colours are the page's own, so both follow the light or dark scheme.

const FONT = "system-ui, Segoe UI, Roboto, sans-serif"; // cytoscape takes no quotes here

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** The sign on a module's box, in its upper left corner. */
function sign(open) {
  const ink = colour("--quiet");
  const bar = open ? "" : `<path d="M7 4v6" stroke="${ink}"/>`;
  const box = `<rect x=".5" y=".5" width="13" height="13" rx="3" fill="none" stroke="${ink}"/>`;
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" width="14" height="14">${box}<path d="M4 7h6" stroke="${ink}"/>${bar}</svg>`;
  return `data:image/svg+xml;utf8,${encodeURIComponent(svg)}`;
}

function stylesheet() {
  const c = Object.fromEntries(["text", "quiet", "surface", "sunken", "line", "strong", "accent", "found", "good", "bad"].map((n) => [n, colour(`--${n}`)]));
  const mark = (ink) => ({ "underlay-color": ink, "underlay-opacity": 0.35, "underlay-padding": 5 });
  return [
    { selector: "core", style: { "active-bg-opacity": 0, "selection-box-opacity": 0 } },
    {
      selector: "node",
      style: {
        shape: "round-rectangle", width: "data(width)", height: "data(height)", label: "data(label)",
        "background-color": c.surface, "border-color": c.strong, "border-width": 1, color: c.text, "font-family": FONT,
        "font-size": 12, "line-height": 1.3, "text-wrap": "wrap", "text-valign": "center", "overlay-opacity": 0,
        "z-index-compare": "manual", "z-index": 100,
      },
    },
    { selector: ".boundary", style: { "background-color": c.sunken, "border-width": 0, "corner-radius": 18, color: c.quiet } },
    { selector: ".held", style: { "border-style": "dashed", color: c.quiet } },
    { selector: ".role", style: { "border-color": c.text, "border-width": 1.5 } },
    {
      selector: ".group",
      style: {
        "background-color": c.sunken, "background-image": "data(sign)", "background-width": 14, "background-height": 14,
        "background-position-x": 7, "background-position-y": 8, "background-clip": "none", "background-image-containment": "over",
      },
    },
    {
      selector: ".open",
      style: {
        "background-opacity": 0.55, "border-color": c.line, color: c.quiet, "z-index": "data(depth)",
        "text-valign": "top", "text-halign": "right", "text-margin-x": "data(indent)", "text-margin-y": 23,
      },
    },
    { selector: ".adapter", style: { "background-color": "data(colour)", "background-opacity": 0.16, "border-color": "data(colour)", color: c.text } },
    { selector: ".adapter.open", style: { "background-opacity": 0.06 } },
    { selector: ".added", style: { "border-color": c.good, "border-width": 2 } },
    { selector: ".removed", style: { "border-color": c.bad, "border-width": 2, "border-style": "dashed" } },
    {
      selector: "edge",
      style: {
        width: 1.2, "line-color": c.strong, "target-arrow-color": c.strong, "target-arrow-shape": "triangle", "arrow-scale": 0.75,
        "curve-style": "straight", "source-endpoint": "data(start)", "target-endpoint": "data(end)",
        "overlay-opacity": 0, events: "no", "z-index-compare": "manual", "z-index": 50,
      },
    },
    {
      selector: ".bent",
      style: {
        "curve-style": "round-segments", "edge-distances": "endpoints", "segment-weights": "data(weights)",
        "segment-distances": "data(distances)", "segment-radii": 10,
      },
    },
    { selector: ".near", style: { width: 2, "line-color": c.accent, "target-arrow-color": c.accent, "z-index": 60 } },
    { selector: ".found", style: mark(c.found) },
    { selector: ".chosen", style: { ...mark(c.accent), "border-color": c.accent, "border-width": 2 } },
  ];
}

const pen = document.createElement("canvas").getContext("2d");

function textWidth(text) {
  pen.font = `12px ${FONT}`;
  return Math.max(...text.split("\n").map((line) => pen.measureText(line).width));
}

/** cytoscape knows bends by how far along the straight line between an edge's ends they are, and how far beside it. */
function bends(points) {
  const [a, b] = [points[0], points.at(-1)];
  const [dx, dy] = [b.x - a.x, b.y - a.y];
  const length = Math.hypot(dx, dy) || 1;
  const inner = points.slice(1, -1);
  return {
    weights: inner.map((p) => ((p.x - a.x) * dx + (p.y - a.y) * dy) / length ** 2),
    distances: inner.map((p) => ((p.y - a.y) * dx - (p.x - a.x) * dy) / length),
  };
}
