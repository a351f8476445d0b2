"use strict";
// The page of a results repository. Data is shown as text only; nothing is requested.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const PAGE = 50;
let shown = PAGE, chosen = "";

function make(tag, text, attributes) {
  const e = document.createElement(tag);
  if (text !== undefined && text !== null) e.textContent = String(text);
  for (const [k, v] of Object.entries(attributes || {})) e.setAttribute(k, v);
  return e;
}

function fill(select, options) {
  select.replaceChildren(...options.map(([value, text]) => make("option", text, { value })));
}

function number(value, digits) {
  return value === null || value === undefined ? "–" : value.toFixed(digits === undefined ? 3 : digits);
}

function time(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds >= 7200) return (seconds / 3600).toFixed(1) + " h";
  if (seconds >= 120) return (seconds / 60).toFixed(0) + " min";
  return seconds >= 1 ? seconds.toFixed(1) + " s" : (seconds * 1e3).toPrecision(2) + " ms";
}

function span(low, high) {
  return low === null || low === undefined ? "" : ` [${number(low)}, ${number(high)}]`;
}

function head(table, names) {
  const row = make("tr");
  for (const name of names) row.append(make("th", name, { scope: "col" }));
  const thead = make("thead");
  thead.append(row);
  table.replaceChildren(thead);
  const body = make("tbody");
  table.append(body);
  return body;
}

function current() {
  return data.tables[Number($("table").value) || 0];
}

function pick(label) {
  chosen = label;
  shown = PAGE;
  card();
  history();
  $("method").scrollIntoView();
}

function board() {
  const table = current();
  if (!table) return;
  const by = $("column").value, family = $("family").value;
  const words = $("find").value.trim().toLowerCase();
  $("context").textContent = table.context;
  const columns = table.columns;
  const body = head($("rows"), ["rank", "method", "version", ...columns.map((c) => c.title),
    "build", "query", "bytes/ex", "measured by", "machine"]);
  const better = (columns.find((c) => c.name === by) || {}).higher ? -1 : 1;
  const value = (r) => (r.cells[by] && r.cells[by].value !== null ? r.cells[by].value : null);
  const rows = table.rows.filter((r) => (!family || r.family === family) &&
    (!words || (r.label + " " + r.name + " " + r.family + " " + r.by).toLowerCase().includes(words)));
  rows.sort((a, b) => {
    const x = value(a), y = value(b);
    if (x === null || y === null) return (x === null) - (y === null) || a.label.localeCompare(b.label);
    return better * (x - y) || a.label.localeCompare(b.label);
  });
  for (const r of rows) {
    const tr = make("tr");
    const main = r.cells[by];
    tr.append(make("td", main && main.rank ? main.rank : "–", { class: "num" }));
    const th = make("th", null, { scope: "row" });
    const button = make("button", r.label, { type: "button", class: "plain" });
    button.addEventListener("click", () => pick(r.name));
    th.append(button);
    tr.append(th, make("td", r.version, { class: "num" }));
    for (const c of columns) {
      const cell = r.cells[c.name];
      const td = make("td", null, { class: "num" + (cell && cell.best ? " best" : "") });
      if (!cell) td.textContent = "";
      else if (cell.value === null) { td.textContent = cell.status; td.title = cell.reason; }
      else {
        td.append(make("span", number(cell.value), { class: "figure" }));
        td.append(make("span", span(cell.low, cell.high), { class: "interval" }));
      }
      tr.append(td);
    }
    tr.append(make("td", time(r.build), { class: "num" }));
    tr.append(make("td", r.query === null ? "–" : time(r.query / 1e3), { class: "num" }));
    tr.append(make("td", r.bytes === null ? "–" : Math.round(r.bytes).toLocaleString("en"), { class: "num" }));
    tr.append(make("td", r.by || "–"), make("td", data.machines[r.machine] || "–"));
    body.append(tr);
  }
  $("notes").replaceChildren(...table.notes.map((n) => make("li", n)));
}

function card() {
  const about = data.methods[chosen];
  $("method-name").textContent = chosen ? `Method ${chosen}` : "Method";
  const box = $("card");
  box.replaceChildren();
  if (!about) { box.append(make("p", "Choose a method on the board.", { class: "soft" })); return; }
  box.append(make("p", about.summary || "No description was submitted."));
  const list = make("dl", null, { class: "facts" });
  const fact = (name, text) => { if (text) list.append(make("dt", name), make("dd", text)); };
  fact("family", about.family);
  fact("source", about.source);
  fact("package", about.plugin);
  fact("versions", about.versions.join(", "));
  for (const [label, params] of Object.entries(about.params))
    fact(`parameters of ${label}`, Object.entries(params).map(([k, v]) => `${k} = ${JSON.stringify(v)}`).join(", "));
  for (const c of about.costs)
    fact(`cost on ${c.where}`, `build ${time(c.build)}, query ${c.query === null ? "–" : time(c.query / 1e3)}, ` +
      `${c.bytes === null ? "–" : Math.round(c.bytes).toLocaleString("en")} bytes per example` +
      (c.retrainings ? `, ${c.retrainings.toLocaleString("en")} retrainings before` : ""));
  box.append(list);
}

function history() {
  const rows = data.history.filter((h) => !chosen || h[0] === chosen);
  const label = chosen ? `of ${chosen}` : "of all methods";
  $("history-note").textContent = `${rows.length.toLocaleString("en")} results ${label}, newest first.`;
  const body = head($("past"), ["date", "method", "version", "suite", "target", "benchmark", "value", "measured by", "machine", "submission"]);
  for (const h of rows.slice(0, shown)) {
    const [, version, name, suite, target, benchmark, value, low, high, status, date, by, machine, place] = h;
    const tr = make("tr");
    for (const text of [date, name, version, suite, target, benchmark])
      tr.append(make("td", text, { class: "value" }));
    tr.append(make("td", value === null ? status : number(value) + span(low, high), { class: "value" }));
    for (const text of [by || "–", data.machines[machine], place]) tr.append(make("td", text));
    body.append(tr);
  }
  $("more").hidden = rows.length <= shown;
}

function machines() {
  const body = head($("hardware"), ["machine", "measured by", "submissions"]);
  for (const [machine, by, count] of data.who) {
    const tr = make("tr");
    for (const text of [data.machines[machine], by || "–", count.toLocaleString("en")]) tr.append(make("td", text));
    body.append(tr);
  }
  const bad = data.refused.map(([place, reason]) => make("li", `${place}: ${reason}`));
  $("bad").replaceChildren(...(bad.length ? bad : [make("li", "None")]));
}

function table() {
  const t = current();
  if (!t) return;
  fill($("column"), t.columns.map((c) => [c.name, c.title]));
  $("column").value = t.primary;
  const families = [...new Set(t.rows.map((r) => r.family))].sort();
  fill($("family"), [["", "all"], ...families.map((f) => [f, f])]);
  board();
}

const THEMES = ["system", "light", "dark"];
$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const next = THEMES[(THEMES.indexOf(root.dataset.theme || "system") + 1) % 3];
  if (next === "system") delete root.dataset.theme; else root.dataset.theme = next;
  $("theme").textContent = `Theme: ${next}`;
});
fill($("table"), data.tables.map((t, i) => [i, `${t.suite} · ${t.target}`]));
$("table").addEventListener("change", table);
$("column").addEventListener("change", board);
$("family").addEventListener("change", board);
$("find").addEventListener("input", board);
$("more").addEventListener("click", () => { shown += PAGE; history(); });
table();
card();
// The board is drawn first: the rest lies below it.
setTimeout(() => { history(); machines(); });
