"use strict";
// Every string of the data becomes a text node; nothing is ever parsed as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#9a4f78", "#b8860b"];
  const COSTS = {
    prepare: ["prepare", "prepare_seconds", seconds],
    build: ["build", "build_seconds", seconds],
    query: ["query", "query_ms", (v) => seconds(v / 1000)],
    bytes: ["bytes/ex", "bytes_per_example", count],
  };
  // What a method needs before its first score includes its preparation, done once.
  const AXES = { build: "prepare + build (s)", query: "query (ms per query)", bytes: "bytes per example", prepare: "prepare (s)" };

  // ------------------------------------------------------------------ elements

  function build(make, tag, attributes, children) {
    const e = make(tag);
    for (const [k, v] of Object.entries(attributes || {})) {
      if (v === null || v === undefined || v === false) continue;
      if (k.startsWith("on")) e.addEventListener(k.slice(2), v);
      else if (k === "style") Object.assign(e.style, v);
      else e.setAttribute(k, v === true ? "" : v);
    }
    e.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined));
    return e;
  }
  const h = (tag, attributes, ...children) => build((t) => document.createElement(t), tag, attributes, children);
  const s = (tag, attributes, ...children) =>
    build((t) => document.createElementNS("http://www.w3.org/2000/svg", t), tag, attributes, children);
  // Untrusted text: isolated, in its own direction.
  const said = (text, attributes) => h("bdi", { dir: "auto", ...attributes }, text);
  let ids = 0;
  const unique = (name) => `${name}-${++ids}`;

  function choice(label, options, value, change) {
    const select = h("select", { onchange: () => change(select.value) });
    for (const [key, text] of options) select.append(h("option", { value: key, selected: key === value }, text));
    return h("label", null, `${label} `, select);
  }

  // ------------------------------------------------------------------ numbers

  const known = (v) => v !== null && v !== undefined && Number.isFinite(v);
  function fixed(v, digits = 3) {
    if (!known(v)) return "–";
    if (Math.abs(v) >= 1000) return count(v);
    const text = v.toFixed(digits);
    return /^-0\.?0*$/.test(text) ? text.slice(1) : text;
  }
  const three = (v) => (v >= 99.95 ? Math.round(v).toLocaleString("en") : v >= 9.995 ? v.toFixed(0) : v >= 0.9995 ? v.toFixed(1) : String(+v.toPrecision(2)));
  function seconds(v) {
    if (!known(v)) return "–";
    if (v >= 7200) return `${three(v / 3600)} h`;
    if (v >= 120) return `${three(v / 60)} min`;
    return v >= 1 ? `${three(v)} s` : `${three(v * 1000)} ms`;
  }
  function count(v) {
    if (!known(v)) return "–";
    return v >= 10 || v === Math.trunc(v) ? Math.round(v).toLocaleString("en") : v.toFixed(1);
  }

  function bytes(v) {
    if (!known(v)) return "–";
    const unit = v >= 2 ** 30 ? ["GiB", 2 ** 30] : v >= 2 ** 20 ? ["MiB", 2 ** 20] : v >= 10240 ? ["KiB", 1024] : ["bytes", 1];
    return `${three(v / unit[1])} ${unit[0]}`;
  }
  function metric(m) {
    if (!known(m.low)) return `${Number.isInteger(m.value) ? count(m.value) : fixed(m.value)}${m.unit ? ` ${m.unit}` : ""}`;
    return `${fixed(m.value)} [${fixed(m.low)}, ${fixed(m.high)}]${m.unit ? ` ${m.unit}` : ""}`;
  }

  // ------------------------------------------------------------------ 16-bit numbers

  const opened = new Map();
  function blob(id) {
    if (!opened.has(id)) {
      const text = atob(document.getElementById(id).textContent);
      const bytes = new Uint8Array(text.length);
      for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
      opened.set(id, new DataView(bytes.buffer));
    }
    return opened.get(id);
  }
  function share(id, place, scale) {
    const v = blob(id).getInt16(2 * place, true);
    return v === -32768 ? null : (v / 32767) * scale;
  }

  // ------------------------------------------------------------------ tables

  function header(columns, state, sortBy) {
    return h("thead", null, h("tr", null, columns.map((c) => {
      const sorted = state.key === c.key ? (state.up ? "ascending" : "descending") : "none";
      const button = h("button", { type: "button", "data-key": c.key, disabled: c.locked, title: c.locked, onclick: () => sortBy(c.key) }, said(c.name));
      return h("th", { scope: "col", class: c.numeric ? "num" : null, "aria-sort": c.locked ? null : sorted }, c.sortable === false ? said(c.name) : button);
    })));
  }
  function order(rows, value, up) {
    const have = rows.filter((r) => value(r) !== null && value(r) !== undefined && !Number.isNaN(value(r)));
    const lack = rows.filter((r) => !have.includes(r));
    have.sort((a, b) => {
      const x = value(a), y = value(b);
      const d = typeof x === "string" ? x.localeCompare(y) : x - y;
      return up ? d : -d;
    });
    return [...have, ...lack];
  }
  // Sorting redraws the header, so the pressed button gets the focus back.
  function redraw(table, parts, key) {
    const had = table.contains(document.activeElement);
    table.replaceChildren(...parts);
    if (!had || key === null) return;
    for (const b of table.querySelectorAll("thead button")) if (b.dataset.key === key) b.focus();
  }

  // ------------------------------------------------------------------ the board

  function interval(cell) {
    return known(cell.low) && known(cell.high) ? h("span", { class: "interval" }, ` [${fixed(cell.low)}, ${fixed(cell.high)}]`) : null;
  }
  function places(c) {
    return c.rank_low < c.rank_high ? `${c.rank_low}–${c.rank_high}` : `${c.rank}`;
  }
  function valueCell(cell, withInterval) {
    if (!cell) return h("td", { class: "value" }, "–");
    if (cell.status !== "ok" || !known(cell.value)) return h("td", { class: "bad", title: cell.reason }, cell.status);
    const these = known(cell.low_these_tasks) ? ` for new tasks, ${fixed(cell.low_these_tasks)} to ${fixed(cell.high_these_tasks)} for these` : "";
    const title = known(cell.low) ? `95% interval ${fixed(cell.low)} to ${fixed(cell.high)}${these}` : null;
    return h("td", { class: cell.best ? "value best" : "value", title },
      h("span", { class: "figure" }, fixed(cell.value)), cell.letters ? h("span", { class: "soft", title: "methods that share a letter do not differ significantly" }, ` ${cell.letters}`) : null, withInterval ? interval(cell) : null);
  }
  function meter(share) {
    if (!known(share)) return h("td", null, "–");
    const percent = Math.round(share * 100);
    const width = `${Math.max(0, Math.min(100, percent))}%`;
    return h("td", { class: "value" }, h("span", { class: "meter", "aria-hidden": "true" }, h("span", { style: { width } })), `${percent}%`);
  }
  function facts(pairs) {
    return h("dl", { class: "facts" }, pairs.filter(([, v]) => v !== null && v !== undefined && v !== "").map(([k, v]) => [
      h("dt", null, said(k)), h("dd", null, v instanceof Node ? v : said(typeof v === "string" ? v : JSON.stringify(v)))]));
  }
  const nested = (v) => (v && typeof v === "object" && !Array.isArray(v) ? facts(Object.entries(v).map(([k, x]) => [k, nested(x)])) : Array.isArray(v) ? v.join(", ") : v);
  function details(table, row, width) {
    const parts = [];
    for (const [name, cell] of Object.entries(row.cells)) {
      if (cell.status !== "ok") parts.push(h("p", { class: "bad" }, said(name), `: ${cell.status}: `, said(cell.reason)));
    }
    parts.push(facts([
      ["method", `${row.name} (version ${row.version})`], ["plugin", row.plugin], ["family", row.family],
      ["parameters", Object.keys(row.params).length ? row.params : null],
      ["build", known(row.cost.build_seconds) ? `${seconds(row.cost.build_seconds)}, peak memory ${bytes(row.cost.build_peak_bytes)}` : null],
      ["query", known(row.cost.query_ms) ? `${seconds(row.cost.query_ms / 1000)} per query, peak memory ${bytes(row.cost.query_peak_bytes)}` : null],
      ["index", known(row.cost.index_bytes) ? bytes(row.cost.index_bytes) : null],
      ["prepare", known(row.cost.prepare_seconds) ? `${seconds(row.cost.prepare_seconds)}${known(row.cost.retrainings) ? `, ${count(row.cost.retrainings)} retrainings` : ""} (once)` : null],
    ]));
    const measured = Object.entries(row.cells).filter(([, cell]) => Object.keys(cell.metrics || {}).length);
    parts.push(h("div", { class: "sides" }, measured.map(([name, cell]) => h("div", null, h("h3", null, said(name)), facts(Object.entries(cell.metrics).map(([k, m]) => [k, metric(m)])),
      (cell.notes || []).map((note) => h("p", { class: "soft" }, said(note)))))));
    if (row.log_tail.length) parts.push(h("h3", null, "End of the log"), h("pre", { tabindex: "0", dir: "auto" }, row.log_tail.join("\n")));
    return h("tr", { class: "details" }, h("td", { colspan: width }, h("div", { class: "inner" }, parts)));
  }

  function board(table) {
    const state = { key: "rank", up: true, primary: table.primary, filter: "", open: new Set() };
    const several = table.machines.length > 1;
    const element = h("table", { id: "board-table" });
    const status = h("p", { class: "hidden", role: "status", "aria-live": "polite" });
    const caption = h("caption", null, said(table.context, { class: "inner" }));

    function columns() {
      const primary = table.columns.find((c) => c.name === state.primary);
      const others = table.columns.filter((c) => c !== primary && table.rows.some((r) => r.cells[c.name] && r.cells[c.name].status === "ok"));
      const locked = several ? "times from several machines are not ranked" : false;
      const cell = (r, name) => (r.cells[name] && r.cells[name].status === "ok" ? r.cells[name] : null);
      const used = Object.entries(COSTS).filter(([, [, field]]) => table.rows.some((r) => known(r.cost[field])));
      return [
        { key: "rank", name: "rank", up: true, numeric: true, value: (r) => (cell(r, state.primary) || {}).rank, draw: (r) => { const c = cell(r, state.primary); return h("td", { class: "num" }, c && c.rank ? places(c) : "–"); } },
        { key: "method", name: "method", up: true, value: (r) => r.label.toLowerCase(), draw: nameCell },
        { key: `b:${primary.name}`, name: `${primary.title} [95%]`, up: !primary.higher_is_better, value: (r) => (cell(r, primary.name) || {}).value, draw: (r) => valueCell(r.cells[primary.name], true) },
        ...(known(primary.ceiling) ? [{ key: "share", name: "of ceiling", up: false, value: (r) => (cell(r, primary.name) || {}).share, draw: (r) => meter((cell(r, primary.name) || {}).share) }] : []),
        ...others.map((c) => ({ key: `b:${c.name}`, name: c.title, up: !c.higher_is_better, value: (r) => (cell(r, c.name) || {}).value, draw: (r) => valueCell(r.cells[c.name], false) })),
        ...used.map(([key, [name, field, write]]) => ({
          key, name, up: true, numeric: true, locked: key === "bytes" ? false : locked, value: (r) => r.cost[field],
          draw: (r) => h("td", { class: "num" }, write(r.cost[field]) + (several && key !== "bytes" && known(r.cost[field]) && r.machine !== null ? ` #${r.machine + 1}` : "")),
        })),
      ];
    }
    function nameCell(row) {
      const open = state.open.has(row.label);
      return h("th", { scope: "row" }, h("button", { type: "button", class: "plain", "aria-expanded": String(open), "data-row": row.label, onclick: () => { open ? state.open.delete(row.label) : state.open.add(row.label); draw(null, row.label); } }, said(row.label)));
    }
    function sortBy(key) {
      const column = columns().find((c) => c.key === key);
      if (state.key === key) state.up = !state.up;
      else Object.assign(state, { key, up: column.up });
      status.textContent = `Sorted by ${column.name}, ${state.up ? "ascending" : "descending"}.`;
      draw(key);
    }
    function draw(focus = null, focusRow = null) {
      const all = columns();
      const by = all.find((c) => c.key === state.key) || all[0];
      const wanted = state.filter.toLowerCase();
      const matching = table.rows.filter((r) => `${r.label} ${r.family} ${r.name}`.toLowerCase().includes(wanted));
      const bySign = table.columns.find((c) => c.name === state.primary).higher_is_better;
      const ranked = order(matching, (r) => { const c = r.cells[state.primary]; return c && c.status === "ok" ? c.value : null; }, !bySign);
      const body = h("tbody");
      for (const row of order(ranked, by.value, state.up)) {
        const failed = !Object.values(row.cells).some((c) => c.status === "ok");
        const first = row.cells[state.primary];
        if (failed) {
          body.append(h("tr", { class: "failed" }, h("td", { class: "num" }, "–"), nameCell(row), h("td", { colspan: all.length - 2 },
            h("span", { class: "bad" }, `${first ? first.status : "absent"}: `), said(first ? first.reason : "not run"))));
        } else body.append(h("tr", null, all.map((c) => c.draw(row))));
        if (state.open.has(row.label)) body.append(details(table, row, all.length));
      }
      redraw(element, [caption, header(all, state, sortBy), body], focus);
      if (focusRow !== null) for (const b of element.querySelectorAll("button.plain")) if (b.dataset.row === focusRow) b.focus();
    }
    draw();
    const controls = h("div", { class: "controls" },
      table.columns.length > 1 ? choice("Rank by", table.columns.map((c) => [c.name, c.title]), state.primary, (v) => { state.primary = v; state.key = "rank"; state.up = true; draw(); }) : null,
      h("label", null, "Find ", h("input", { type: "search", placeholder: "method or family", oninput: (e) => { state.filter = e.target.value; draw(); } })));
    return section("board", "Board", controls, status, h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Board" }, element),
      h("ul", { class: "notes" }, table.footnotes.map((n) => h("li", null, said(n)))),
      h("p", { class: "soft" }, "Brackets contain 95% intervals. A rank is an interval of places. Methods that share a letter do not differ significantly at 5% in a paired test, Holm-corrected over all pairs; coloured figures are the best and those that do not differ significantly from it. Select a method for its parameters, metrics and log."));
  }

  // ------------------------------------------------------------------ plots

  const tip = document.getElementById("tip");
  function showTip(text, at) {
    tip.textContent = text;
    tip.hidden = false;
    const box = at.getBoundingClientRect();
    tip.style.left = `${Math.min(box.right + 8, window.innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.max(4, box.top - tip.offsetHeight - 4)}px`;
  }
  const hideTip = () => { tip.hidden = true; };
  document.addEventListener("keydown", (e) => { if (e.key === "Escape") hideTip(); });
  function mark(element, text) {
    element.setAttribute("tabindex", "0");
    element.setAttribute("role", "img");
    element.setAttribute("aria-label", text);
    element.classList.add("mark");
    for (const event of ["mouseenter", "focus"]) element.addEventListener(event, () => showTip(text, element));
    for (const event of ["mouseleave", "blur"]) element.addEventListener(event, hideTip);
    return element;
  }

  function ticks(low, high, log) {
    if (log) {
      const out = [];
      const steps = high / low > 1000 ? [1] : high / low > 10 ? [1, 3] : [1, 2, 5];
      for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++) for (const m of steps) out.push(m * 10 ** p);
      return out.filter((t) => t >= low * 0.999 && t <= high * 1.001);
    }
    const span = high - low || 1;
    const step = [1, 2, 5, 10].map((m) => m * 10 ** Math.floor(Math.log10(span / 4))).find((x) => span / x <= 6);
    const out = [];
    for (let t = Math.ceil(low / step) * step; t <= high + 1e-9 * span; t += step) out.push(+t.toPrecision(12));
    return out;
  }
  const short = (v) => (Math.abs(v) >= 1e5 ? v.toExponential(0).replace("e+", "e") : Math.abs(v) >= 100 ? Math.round(v).toLocaleString("en") : String(+v.toPrecision(3)));

  // Axes with a grid; returns the drawing, and functions from values to positions.
  function axes(label, xs, ys, xName, yName, logY = false) {
    const W = Math.min(640, Math.max(330, document.documentElement.clientWidth - 80)), H = W < 500 ? 360 : 420, left = 60, right = 18, top = 14, bottom = 46;
    const log = Math.min(...xs) > 0 && (logY || Math.max(...xs) >= 5 * Math.min(...xs));
    let [x0, x1] = [Math.min(...xs), Math.max(...xs)];
    if (log) { const pad = (x1 / x0) ** 0.08; x0 /= pad; x1 *= pad; } else { const pad = 0.08 * (x1 - x0 || Math.abs(x1) || 1); x0 -= pad; x1 += pad; }
    const upright = logY && Math.min(...ys) > 0;
    let [y0, y1] = upright ? [Math.min(...ys) / 1.5, Math.max(...ys) * 1.5] : [Math.min(0, ...ys), Math.max(...ys)];
    const room = upright ? 0 : 0.08 * (y1 - y0 || 1);
    y1 += room;
    if (y0 < 0) y0 -= room;
    const f = log ? Math.log : (v) => v;
    const g = upright ? Math.log : (v) => v;
    const x = (v) => left + ((f(v) - f(x0)) / (f(x1) - f(x0))) * (W - left - right);
    const y = (v) => H - bottom - ((g(v) - g(y0)) / (g(y1) - g(y0))) * (H - top - bottom);
    const svg = s("svg", { viewBox: `0 0 ${W} ${H}`, role: "group", "aria-label": label });
    for (const t of ticks(x0, x1, log)) {
      svg.append(s("line", { class: "grid", x1: x(t), x2: x(t), y1: top, y2: H - bottom }), s("text", { x: x(t), y: H - bottom + 16, "text-anchor": "middle" }, short(t)));
    }
    for (const t of ticks(y0, y1, upright)) {
      svg.append(s("line", { class: "grid", x1: left, x2: W - right, y1: y(t), y2: y(t) }), s("text", { x: left - 6, y: y(t) + 4, "text-anchor": "end" }, short(t)));
    }
    svg.append(s("line", { class: "axis", x1: left, x2: W - right, y1: H - bottom, y2: H - bottom }), s("line", { class: "axis", x1: left, x2: left, y1: top, y2: H - bottom }),
      s("text", { x: (left + W - right) / 2, y: H - 8, "text-anchor": "middle" }, xName),
      s("text", { transform: `translate(13 ${(top + H - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, yName));
    return { svg, x, y, W, H, left, right, top, bottom };
  }
  // Puts a label beside each point, the first ones nearest; farther ones get a line. None overlap.
  function labels(a, points) {
    const size = 5;
    const taken = points.map((p) => [a.x(p.x) - size, a.y(p.y) - size, a.x(p.x) + size, a.y(p.y) + size]);
    const clear = (b) => taken.every((o) => b[2] <= o[0] || b[0] >= o[2] || b[3] <= o[1] || b[1] >= o[3]);
    for (const p of points) {
      const [px, py] = [a.x(p.x), a.y(p.y)];
      const label = p.label.length > 22 ? `${p.label.slice(0, 21)}…` : p.label;
      const [width, height] = [6.3 * label.length + 4, 12];
      let found = null;
      for (let ring = 0; ring < 12 && !found; ring++) {
        const away = 8 + 12 * ring;
        for (const [dx, dy] of [[1, -.4], [1, .4], [-1, -.4], [-1, .4], [0, -1], [0, 1], [.6, -1], [.6, 1], [-.6, -1], [-.6, 1]]) {
          const [cx, cy] = [px + dx * away, py + dy * away];
          const x0 = dx > 0 ? cx : dx < 0 ? cx - width : cx - width / 2;
          const box = [x0, cy - height / 2, x0 + width, cy + height / 2];
          if (box[0] < a.left || box[2] > a.W || box[1] < a.top - 6 || box[3] > a.H - a.bottom || !clear(box)) continue;
          found = { box, near: ring === 0 };
          break;
        }
      }
      if (!found) continue;
      const [x0, y0, x1, y1] = found.box;
      taken.push(found.box);
      if (!found.near) a.svg.append(s("line", { class: "lead", x1: px, y1: py, x2: Math.max(x0, Math.min(px, x1)), y2: py < y0 ? y0 : Math.min(py, y1) }));
      a.svg.append(s("text", { class: "label", x: (x0 + x1) / 2, y: y1 - 3, "text-anchor": "middle", "font-weight": p.front ? "700" : "400", "aria-hidden": "true" }, label));
    }
  }
  function legend(names, colour) {
    return h("ul", { class: "legend" }, names.map((n) => h("li", null, h("span", { class: "swatch", style: { background: colour(n) } }), said(n || "other"))));
  }
  function numbersTable(head, rows) {
    return h("details", null, h("summary", null, "The numbers"), h("div", { class: "scroll", tabindex: "0" }, h("table", null,
      h("thead", null, h("tr", null, head.map((t) => h("th", { scope: "col" }, said(t))))),
      h("tbody", null, rows.map((r) => h("tr", null, r.map((c, i) => h(i ? "td" : "th", i ? null : { scope: "row" }, said(c)))))))));
  }

  function scatter(table) {
    const has = Object.keys(COSTS).filter((k) => k !== "prepare" && table.rows.some((r) => known(r.cost[COSTS[k][1]])) && (k === "bytes" || table.machines.length < 2));
    if (!has.length) return null;
    const state = { x: has.includes("query") ? "query" : has[0], y: table.primary };
    const holder = h("div");
    function draw() {
      const column = table.columns.find((c) => c.name === state.y);
      const field = COSTS[state.x][1];
      const cost = (r) => r.cost[field] + (state.x === "build" && known(r.cost.prepare_seconds) ? r.cost.prepare_seconds : 0);
      const points = table.rows.filter((r) => r.cells[state.y] && r.cells[state.y].status === "ok" && known(r.cost[field]) && r.cost[field] > 0)
        .map((r) => ({ label: r.label, family: r.family, pipeline: r.family === "pipeline" ? r.name : "", x: cost(r), ...pick(r.cells[state.y]) }));
      if (!points.length) return holder.replaceChildren(h("p", null, "No method has both values."));
      const sign = column.higher_is_better ? 1 : -1;
      const rivals = points.filter((p) => p.family !== "control"); // controls are drawn, and form no front
      for (const p of rivals) p.front = !rivals.some((q) => q.x <= p.x && sign * q.y >= sign * p.y && (q.x < p.x || sign * q.y > sign * p.y));
      const families = [...new Set(points.map((p) => p.family))];
      const colour = (f) => COLOURS[families.indexOf(f) % COLOURS.length];
      const ys = points.flatMap((p) => [p.y, p.low, p.high]).filter(known);
      const a = axes(`${column.title} against ${AXES[state.x]}`, points.map((p) => p.x), known(column.ceiling) ? [...ys, column.ceiling] : ys, AXES[state.x], column.title);
      if (known(column.ceiling)) {
        a.svg.append(s("line", { class: "axis", "stroke-dasharray": "2 3", x1: 60, x2: a.W - a.right, y1: a.y(column.ceiling), y2: a.y(column.ceiling) }),
          s("text", { x: a.W - a.right, y: a.y(column.ceiling) - 4, "text-anchor": "end" }, "noise ceiling"));
      }
      const front = points.filter((p) => p.front).sort((p, q) => p.x - q.x);
      a.svg.append(s("polyline", { class: "axis", fill: "none", "stroke-dasharray": "5 4", points: front.map((p) => `${a.x(p.x)},${a.y(p.y)}`).join(" ") }));
      for (const name of new Set(points.map((p) => p.pipeline).filter(Boolean))) { // a pipeline over k
        const path = points.filter((p) => p.pipeline === name).sort((p, q) => p.x - q.x);
        if (path.length > 1) a.svg.append(s("polyline", { fill: "none", stroke: colour("pipeline"), points: path.map((p) => `${a.x(p.x)},${a.y(p.y)}`).join(" ") }));
      }
      for (const p of [...points].sort((p, q) => !!p.front - !!q.front || q.y - p.y)) {
        const [px, py] = [a.x(p.x), a.y(p.y)];
        if (known(p.low) && known(p.high)) a.svg.append(s("line", { x1: px, x2: px, y1: a.y(p.low), y2: a.y(p.high), stroke: colour(p.family) }));
        const text = `${p.label}: ${column.title} ${fixed(p.y)}${known(p.low) ? ` [${fixed(p.low)}, ${fixed(p.high)}]` : ""}, ${COSTS[state.x][0]} ${COSTS[state.x][2](p.x)}${p.front ? ", on the Pareto front" : ""}`;
        a.svg.append(mark(s("circle", { cx: px, cy: py, r: p.front ? 6 : 4.5, fill: colour(p.family) }), text));
      }
      labels(a, [...points].sort((p, q) => !!q.front - !!p.front || q.y - p.y));
      holder.replaceChildren(a.svg, legend(families, colour), numbersTable(["method", column.title, "interval", AXES[state.x], "Pareto front"],
        points.map((p) => [p.label, fixed(p.y), known(p.low) ? `${fixed(p.low)} to ${fixed(p.high)}` : "–", COSTS[state.x][2](p.x), p.front ? "yes" : "no"])));
    }
    const pick = (c) => ({ y: c.value, low: c.low, high: c.high });
    draw();
    return h("figure", null, h("h3", null, "Fidelity against cost"), h("div", { class: "controls" },
      choice("Cost", has.map((k) => [k, AXES[k]]), state.x, (v) => { state.x = v; draw(); }),
      choice("Value", table.columns.map((c) => [c.name, c.title]), state.y, (v) => { state.y = v; draw(); })), holder,
    h("figcaption", null, "The dashed line joins methods that no cheaper method beats. Hover over or tab to a point for its figures."));
  }

  // Lines keep their colours; with many methods, only the first few are drawn at first.
  const FIRST_LINES = 8;
  function linePlot(plot) {
    const names = plot.lines.filter((l) => !l.reference).map((l) => l.label);
    const off = new Set(names.slice(FIRST_LINES));
    const colour = (line) => (line.reference ? "#8c8c8c" : COLOURS[names.indexOf(line.label) % COLOURS.length]);
    const dash = (line) => (line.reference ? "5 4" : names.indexOf(line.label) >= COLOURS.length ? "9 3" : null);
    const holder = h("div");
    function draw() {
      const drawn = plot.lines.filter((l) => l.reference || !off.has(l.label));
      const wide = drawn.filter((l) => l.x.length > 1);
      if (!wide.length) return holder.replaceChildren(h("p", null, "No line is selected."));
      const ys = drawn.flatMap((l) => [...l.y, ...(l.x.length > 1 && !plot.log ? [...l.low, ...l.high] : [])]).filter(known);
      const a = axes(plot.title, wide.flatMap((l) => l.x), ys, plot.x, plot.y, plot.log);
      for (const line of drawn) {
        if (line.x.length === 1) {
          a.svg.append(s("line", { class: "axis", "stroke-dasharray": "2 3", x1: 60, x2: a.W - a.right, y1: a.y(line.y[0]), y2: a.y(line.y[0]) }), s("text", { x: a.W - a.right, y: a.y(line.y[0]) - 4, "text-anchor": "end" }, line.label));
          continue;
        }
        const at = line.x.map((x, i) => [x, line.y[i], line.low[i], line.high[i]]).filter((p) => known(p[1]));
        a.svg.append(s("polyline", { fill: "none", stroke: colour(line), "stroke-width": 2, "stroke-dasharray": dash(line), points: at.map((p) => `${a.x(p[0])},${a.y(p[1])}`).join(" ") }));
        for (const [x, y, low, high] of at) {
          const text = `${line.label} at ${count(x)}: ${figure(y)}${known(low) ? ` [${fixed(low)}, ${fixed(high)}]` : ""}`;
          if (known(low) && known(high) && !plot.log) a.svg.append(s("line", { stroke: colour(line), opacity: ".45", x1: a.x(x), x2: a.x(x), y1: a.y(low), y2: a.y(high) }));
          a.svg.append(mark(s("circle", { cx: a.x(x), cy: a.y(y), r: 4, fill: colour(line) }), text));
        }
      }
      holder.replaceChildren(a.svg);
    }
    const figure = (v) => (plot.log ? short(v) : fixed(v));
    draw();
    const key = h("ul", { class: "legend" }, plot.lines.filter((l) => l.x.length > 1).map((line) => {
      const swatch = h("span", { class: "swatch", style: { background: colour(line) } });
      if (line.reference) return h("li", null, swatch, said(line.label));
      const button = h("button", { type: "button", class: "line", "aria-pressed": String(!off.has(line.label)), onclick: () => {
        off.has(line.label) ? off.delete(line.label) : off.add(line.label);
        button.setAttribute("aria-pressed", String(!off.has(line.label)));
        draw();
      } }, swatch, said(line.label));
      return h("li", null, button);
    }));
    return h("figure", null, h("h3", null, said(plot.title)), holder, key,
      numbersTable(["line", plot.x, plot.y, "interval"], plot.lines.flatMap((l) => l.x.map((x, i) =>
        [l.label, l.x.length > 1 ? count(x) : "–", figure(l.y[i]), known(l.low[i]) ? `${fixed(l.low[i])} to ${fixed(l.high[i])}` : "–"]))));
  }

  function heat(label, matrix, corner) {
    const top = Math.max(...matrix.values.flat().filter(known).map(Math.abs), 0.1);
    const state = { key: null, up: false };
    const element = h("table", { class: "heat" });
    const caption = h("caption", null, said(label, { class: "inner" }));
    const rows = matrix.rows.map((name, i) => ({ name, values: matrix.values[i] }));
    function draw(focus = null) {
      const columns = [{ key: "name", name: corner }, ...matrix.columns.map((c, i) => ({ key: String(i), name: matrix.counts && matrix.counts.length ? `${c} (${matrix.counts[i]})` : c, numeric: true }))];
      const value = state.key === "name" ? (r) => r.name.toLowerCase() : (r) => r.values[+state.key];
      const ordered = state.key === null ? rows : order(rows, value, state.up);
      const body = h("tbody", null, ordered.map((r) => h("tr", null, h("th", { scope: "row" }, said(r.name)), r.values.map((v) => {
        if (!known(v)) return h("td", null, "–");
        const strength = Math.min(1, Math.abs(v) / top) * 0.55;
        return h("td", { style: { backgroundColor: `rgba(var(--${v >= 0 ? "plus" : "minus"}), ${strength.toFixed(3)})` } }, fixed(v, 2));
      }))));
      redraw(element, [caption, header(columns, state, (key) => {
        if (state.key === key) state.up = !state.up;
        else Object.assign(state, { key, up: key === "name" });
        draw(key);
      }), body], focus);
    }
    draw();
    return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, element);
  }

  function plots(table) {
    const parts = [scatter(table), ...table.lines.map(linePlot)].filter(Boolean);
    if (table.transfer) parts.push(h("figure", null, h("h3", null, "Transfer"), heat("LDS of scores computed on this target, against each target's truth", table.transfer, "method")));
    return section("plots", "Plots", parts.length ? h("div", { class: "plots" }, parts) : h("p", null, "The records contain nothing to plot."));
  }

  function tasks(table) {
    const names = Object.keys(table.tasks);
    if (!names.length) return section("tasks", "By task", h("p", { class: "soft" }, "No task labels are available for the queries. ", said(data.reason)));
    const holder = h("div");
    const draw = (name) => holder.replaceChildren(heat(`Mean value by task of the query (number of queries): ${name}`, table.tasks[name], "method"));
    const first = names.includes(table.primary) ? table.primary : names[0];
    draw(first);
    return section("tasks", "By task", names.length > 1 ? h("div", { class: "controls" }, choice("Benchmark", names.map((n) => [n, n]), first, draw)) : null, holder);
  }

  // ------------------------------------------------------------------ the explorer

  function exampleItem(place, score, also, words) {
    const e = data.train[place];
    return h("li", null, h("span", { class: "badge" }, score >= 0 ? `+${score.toPrecision(3)}` : score.toPrecision(3)), e.task ? h("span", { class: "badge" }, said(e.task)) : null,
      also.length ? h("span", { class: "badge same" }, "also: ", said(also.join(", "))) : null, h("span", { class: "soft id" }, said(e.id)), text(e, words));
  }
  // Words, each shaded by its share of the highest score.
  function shaded(value, shares) {
    let n = -1;
    return value.split(/(\s+)/).map((part) => {
      if (!part || /^\s+$/.test(part)) return part;
      const share = shares[++n] || 0;
      return share > 0.05 ? h("mark", { style: { background: `rgba(0, 140, 100, ${0.6 * share})`, color: "inherit" }, title: `${share.toFixed(2)} of the highest` }, part) : part;
    });
  }
  function text(e, words) {
    if (e.prompt === undefined) return h("div", { class: "soft" }, "text not available");
    if (words) return h("div", { class: "text", dir: "auto" }, shaded(e.prompt, words.prompt), "\n→ ", shaded(e.response, words.response));
    return h("div", { class: "text", tabindex: e.prompt.length + e.response.length > 700 ? "0" : null, dir: "auto" }, `${e.prompt}\n→ ${e.response}`);
  }
  function explorer(table) {
    const ex = table.explorer;
    if (!ex.queries.length) return section("explorer", "Query explorer", h("p", null, "The records contain no per-query values."));
    const state = { place: 0, chosen: new Set(ex.tops.slice(0, 3).map((t) => t.method)), filter: "" };
    const list = h("select", { size: "16", "aria-label": "Queries", onchange: () => show(+list.value) });
    const shown = h("div", { "aria-live": "polite" });
    const place = h("span", { class: "soft" });
    const searchable = ex.queries.map((q) => { const e = data.queries[q]; return `${e.id} ${e.task || ""} ${e.prompt || ""} ${e.response || ""}`.toLowerCase(); });
    let visible = [];

    function fill() {
      visible = ex.queries.map((_, i) => i).filter((i) => searchable[i].includes(state.filter.toLowerCase()));
      list.replaceChildren(...visible.map((i) => {
        const e = data.queries[ex.queries[i]];
        return h("option", { value: i, dir: "auto" }, `${e.id}${e.prompt ? ` · ${e.prompt.slice(0, 60).replace(/\n/g, " ")}` : ""}`);
      }));
      if (visible.length && !visible.includes(state.place)) state.place = visible[0];
      if (visible.length) show(state.place);
      else { shown.replaceChildren(h("p", null, "No query matches.")); place.textContent = ""; }
    }
    function step(by) {
      const at = visible.indexOf(state.place) + by;
      if (at >= 0 && at < visible.length) show(visible[at]);
    }
    function entries(top, side) {
      const part = top[side];
      const out = [];
      for (let j = 0; j < part.k; j++) {
        const at = state.place * part.k + j;
        const view = blob(`${part.blob}i`);
        const index = part.bytes === 2 ? view.getUint16(2 * at, true) : view.getUint32(4 * at, true);
        const score = share(`${part.blob}s`, at, part.scale[state.place]);
        if (score !== null) out.push({ index, score });
      }
      return out;
    }
    function show(i) {
      state.place = i;
      list.value = String(i);
      place.textContent = `${visible.indexOf(i) + 1} of ${visible.length}`;
      const e = data.queries[ex.queries[i]];
      const columns = table.columns.filter((c) => ex.values.some((v) => v.column === c.name));
      const methods = table.rows.map((r) => r.label).filter((l) => ex.values.some((v) => v.method === l));
      const rows = methods.map((m) => [m, ...columns.map((c) => { const v = ex.values.find((x) => x.column === c.name && x.method === m); return v ? fixed(share(v.blob, i, v.scale)) : "–"; })]);
      const tops = ex.tops.filter((t) => state.chosen.has(t.method)).map((t) => ({ method: t.method, words: t.words[i] || { query: null, examples: {} }, top: entries(t, "top"), bottom: entries(t, "bottom") }));
      const shared = (side, index, method) => tops.filter((t) => t.method !== method && t[side].some((x) => x.index === index)).map((t) => t.method);
      // A method without negative scores names no harmful examples.
      const lowest = (t) => (t.bottom.length && t.bottom.every((x) => x.score >= 0) ? "Lowest scores (none negative)" : "Most harmful");
      const rows_of = (t, side) => { const harmful = t.bottom.filter((x) => x.score < 0); return side === "bottom" && harmful.length ? harmful : t[side]; };
      const part = (t, side, title) => [h("h4", { class: "soft" }, title), h("ol", null, rows_of(t, side).map((x) => exampleItem(x.index, x.score, shared(side, x.index, t.method), side === "top" ? t.words.examples[x.index] : null)))];
      const asked = (t) => (t.words.query ? [h("h4", { class: "soft" }, "Words of the query that carry the scores below"), text(e, t.words.query)] : []);
      shown.replaceChildren(
        h("div", { class: "card" }, h("h3", null, "Query ", said(e.id), " ", e.task ? h("span", { class: "badge" }, said(e.task)) : null), text(e)),
        h("details", null, h("summary", null, "Every method on this query"), h("div", { class: "scroll", tabindex: "0" }, h("table", null,
          h("thead", null, h("tr", null, ["method", ...columns.map((c) => c.title)].map((t) => h("th", { scope: "col" }, said(t))))),
          h("tbody", null, rows.map((r) => h("tr", null, r.map((c, j) => h(j ? "td" : "th", j ? { class: "num" } : { scope: "row" }, said(c))))))))),
        ex.tops.length
          ? h("div", { class: "sides" }, tops.map((t) => h("div", { class: "card" }, h("h3", null, said(t.method)), asked(t), part(t, "top", "Most helpful"), part(t, "bottom", lowest(t)))))
          : h("p", { class: "soft" }, "These records contain no top examples, so only values are shown."));
    }
    const choices = ex.tops.length ? h("fieldset", { class: "choices" }, h("legend", null, "Methods side by side"), ex.tops.map((t) => {
      const id = unique("m");
      const box = h("input", { type: "checkbox", id, checked: state.chosen.has(t.method), onchange: () => { box.checked ? state.chosen.add(t.method) : state.chosen.delete(t.method); show(state.place); } });
      return h("span", null, box, " ", h("label", { for: id }, said(t.method)));
    })) : null;
    const result = section("explorer", "Query explorer",
      h("p", { class: "soft" }, "The training examples that methods score highest and lowest for a query. Positive: training on the example lowers the query's loss."),
      data.reason ? h("p", { class: "soft" }, said(`Texts: ${data.reason}`)) : null, choices,
      h("div", { class: "explorer" }, h("div", null, h("div", { class: "controls" },
        h("label", null, "Find ", h("input", { type: "search", placeholder: "text, task or id", oninput: (ev) => { state.filter = ev.target.value; fill(); } })),
        h("button", { type: "button", onclick: () => step(-1) }, "Previous"), h("button", { type: "button", onclick: () => step(1) }, "Next"), place), list), shown));
    fill();
    return result;
  }

  // ------------------------------------------------------------------ the page

  function manifest() {
    return section("manifest", "Runs", ...data.runs.map((run) => h("details", { open: data.runs.length === 1 }, h("summary", null, said(run.run || "run")), facts(Object.entries(run).filter(([k]) => k !== "run").map(([k, v]) => {
      if (k === "command" && Array.isArray(v)) return [k, h("code", { dir: "auto" }, v.join(" "))];
      if (v && typeof v === "object" && !Array.isArray(v)) return [k, nested(v)];
      return [k, Array.isArray(v) ? v.join(", ") : v];
    })))));
  }
  function section(id, title, ...parts) {
    const heading = unique("h");
    return h("section", { id, "aria-labelledby": heading }, h("h2", { id: heading }, title), ...parts);
  }

  const main = document.getElementById("main");
  function draw(place) {
    hideTip();
    const table = data.tables[place];
    const warnings = [...data.warnings, ...data.notes];
    const parts = [warnings.length ? h("ul", { class: "notes" }, warnings.map((w) => h("li", null, said(w)))) : null];
    if (table) parts.push(board(table), plots(table), tasks(table), explorer(table));
    else parts.push(h("p", null, "These runs contain no records."));
    main.replaceChildren(...parts.filter(Boolean), manifest());
    const sections = [...main.querySelectorAll("section")].map((x) => [x.id, x.querySelector("h2").textContent]);
    document.getElementById("sections").replaceChildren(h("ul", null, sections.map(([id, title]) => h("li", null, h("a", { href: `#${id}` }, title)))));
  }
  document.getElementById("title").append(said(document.title));
  if (data.tables.length > 1) {
    const select = document.getElementById("target");
    data.tables.forEach((t, i) => select.append(h("option", { value: i }, t.regime && !t.target.includes(t.regime) ? `${t.target} (${t.regime})` : t.target)));
    select.addEventListener("change", () => draw(+select.value));
    document.getElementById("target-choice").hidden = false;
  }

  const themes = ["system", "light", "dark"];
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  let theme = "system";
  try { theme = themes.includes(localStorage.getItem("tdabench-theme")) ? localStorage.getItem("tdabench-theme") : "system"; } catch { /* no storage: the choice lasts as long as the page */ }
  function paint() {
    document.documentElement.dataset.theme = theme === "system" ? (system.matches ? "dark" : "light") : theme;
    button.textContent = `Theme: ${theme}`;
  }
  button.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    try { localStorage.setItem("tdabench-theme", theme); } catch { /* as above */ }
    paint();
  });
  system.addEventListener("change", paint);
  paint();
  draw(0);
})();
