"use strict";
// The first page: what the model is, what the rules did, what was checked, what was not reached.

function card(title, content, wide = false) {
  return el("article", { class: wide ? "card wide" : "card" }, el("h2", {}, title), content);
}

function facts(pairs) {
  return el("dl", { class: "tiles" }, pairs.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

function result(word) {
  return el("span", { class: word === "ok" ? "good" : "bad" }, word);
}

function rulesGrid(rules) {
  const notes = (rule) => el("ul", { class: "notes" }, rule.notes.map((note) => el("li", {}, note)));
  const rows = rules.map((r) => [el("code", {}, r.rule), shown(r.matched), shown(r.skipped), shown(r.rejected), notes(r)]);
  return grid(["rule", "matched", "skipped", "rejected", ""], rows, ["matched", "skipped", "rejected"]);
}

function adaptersGrid(adapters) {
  const name = (one) => el("span", { class: `chip a${adapterNumber(one.name)}` }, one.name);
  const rows = adapters.map((a) => [name(a), a.status, el("code", {}, a.rules), shown(a.sites), shown(a.parameters)]);
  return grid(["adapter", "", "rules", "sites", "parameters"], rows, ["sites", "parameters"]);
}

function showOverview(overview) {
  const checks = overview.verification.map((c) => [c.check, result(c.result), c.figure]);
  const missed = overview.unreached.map((u) => [el("code", {}, u.path), u.reason]);
  const none = (text) => el("p", { class: "quiet" }, text);
  byId("overview").append(
    facts(overview.facts),
    card("Rules", overview.rules.length ? rulesGrid(overview.rules) : none("No adapter is on this model."), true),
    overview.adapters.length ? card("Adapters", adaptersGrid(overview.adapters), true) : "",
    card("Verification", checks.length ? grid(["check", "result", "figure"], checks) : none("Nothing to verify.")),
    card("Environment", grid(["package", "version"], overview.environment)),
    card("Not reached", missed.length ? grid(["part", "reason"], missed) : none("Every part was captured."), true),
  );
}
