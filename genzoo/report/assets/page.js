"use strict";
// All text of runs is untrusted: it is set as textContent, and escaped for Plotly's markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (selector, root = document) => root.querySelector(selector);
  const element = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value === true) node.setAttribute(name, "");
      else if (value !== false && value != null) node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child != null));
    return node;
  };
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const short = (value) => value == null ? "n/a" : typeof value === "number" ? +value.toPrecision(5) : typeof value === "object" ? JSON.stringify(value) : String(value);

  // Colours: one a family, in the order of the table.
  const palette = ["#2f7ed8", "#d9541e", "#2a9d5c", "#b0428f", "#c99a06", "#6a51c7", "#0d9aa8", "#a8512b", "#7a8b1f", "#d64571", "#4a6b8a", "#8f7a5e", "#5aa02c", "#9c2f2f", "#1f5fa0", "#c77cff", "#00735c", "#e0a0a0", "#555555", "#b5651d", "#3a86b7"];
  const families = [...new Set(data.tables.flatMap((table) => table.rows.map((row) => row.model)))];
  const colour = (model) => palette[Math.max(0, families.indexOf(model)) % palette.length];
  const swatch = (model) => { const s = element("span", { class: "swatch", "aria-hidden": "true" }); s.style.background = colour(model); return s; };

  // The card behind a number.
  const dialog = $("#card");
  const list = (object) => element("dl", {}, ...Object.entries(object).flatMap(([k, v]) => [element("dt", {}, k), element("dd", {}, String(short(v)))]));
  function openCard(table, row, name) {
    const column = table.columns.find((c) => c.name === name);
    const cell = name && row.cells[name];
    const parts = [element("button", { class: "close", type: "button", onclick: () => dialog.close() }, "Close"),
      element("h2", { id: "card-title" }, row.label + (column ? " · " + column.label : ""))];
    if (cell) {
      parts.push(element("p", {}, element("strong", {}, cell.text), ` ${column.unit}`, cell.source === "seeds" ? ` — mean ± standard error over ${cell.values.length} seeds` :
        cell.source === "measurement" ? " — one seed; the error is of the measurement alone" : ""));
      parts.push(element("p", {}, "By seed: " + cell.values.map(short).join(", ") + (cell.missing ? `; ${cell.missing} missing or not finite` : "")));
      parts.push(element("h3", {}, "Protocol (equal for comparable scores)"), list({ metric: name, ...data.protocols[cell.protocol] }));
    }
    parts.push(element("h3", {}, "Setting"), list({ ...row.setting, seeds: row.seeds }));
    parts.push(element("h3", {}, "Runs"));
    for (const run of row.runs) {
      const copy = element("button", { type: "button", onclick: () => navigator.clipboard?.writeText(run.command) }, "Copy");
      parts.push(element("p", {}, run.name + (run.git ? `, commit ${run.git.slice(0, 10)}` : "") + (run.started ? `, ${run.started}` : "") + (run.machine ? `, ${run.machine}` : "")));
      if (run.command) parts.push(element("pre", {}, run.command), copy);
    }
    const others = table.columns.filter((c) => row.cells[c.name]);
    parts.push(element("details", {}, element("summary", {}, "All scores of this row"), list(Object.fromEntries(others.map((c) => [c.name, `${row.cells[c.name].text} ${c.unit}`])))));
    parts.push(element("details", {}, element("summary", {}, "Configuration"), list(data.trained[row.trained])));
    dialog.replaceChildren(...parts);
    dialog.showModal();
    dialog.scrollTop = 0;
  }
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

  // Tables.
  function board(table, index) {
    const shown = new Set(table.columns.filter((c) => c.headline).map((c) => c.name));
    const first = table.columns.find((c) => c.headline && !c.cost && c.ranked);
    const state = { by: first ? first.name : null, down: first ? first.better === "higher" : false, filter: "" };
    const head = element("thead"), body = element("tbody");
    const value = (row) => state.by === "" ? row.label : row.cells[state.by]?.mean ?? null;
    function compare(a, b) {
      const x = value(a), y = value(b);
      if (x === y) return 0;
      if (x === null) return 1; // what was not measured stays at the end
      if (y === null) return -1;
      return (x < y ? -1 : 1) * (state.down ? -1 : 1);
    }
    function header(name, text, column) {
      const sorted = state.by === name;
      const sort = () => { if (state.by === name) state.down = !state.down; else { state.by = name; state.down = column?.better === "higher"; } draw(true); };
      const button = element("button", { type: "button", "data-sort": name, onclick: sort, title: column ? (column.ranked ? `${column.better} is better` : column.note) : null }, text);
      return element("th", { scope: "col", "aria-sort": sorted ? (state.down ? "descending" : "ascending") : "none" }, button, column?.unit ? element("div", { class: "faint" }, column.unit) : null);
    }
    function draw(refocus) {
      const columns = table.columns.filter((c) => shown.has(c.name));
      const focused = refocus ? document.activeElement?.dataset?.sort : null;
      head.replaceChildren(element("tr", {}, header("", "family"), ...columns.map((c) => header(c.name, c.label + (c.ranked ? (c.better === "lower" ? " ↓" : " ↑") : ""), c)), element("th", { scope: "col" }, "seeds")));
      const wanted = state.filter.toLowerCase().split(/\s+/).filter(Boolean);
      const rows = table.rows.filter((row) => wanted.every((word) => row.label.toLowerCase().includes(word)));
      if (state.by !== null) rows.sort(compare);
      const show = (row) => element("tr", {},
        element("td", {}, swatch(row.model), element("button", { type: "button", onclick: () => openCard(table, row, null) }, row.label),
          row.ended ? element("small", { class: "bad" }, ` ${row.ended}`) : null),
        ...columns.map((c) => {
          const cell = row.cells[c.name];
          if (!cell) return element("td", { class: "none" }, "n/a");
          const button = element("button", { type: "button", "aria-label": `${row.label}, ${c.label}: ${cell.text}. Show how it was made`, onclick: () => openCard(table, row, c.name) }, cell.text);
          return element("td", { class: cell.mark || null }, button, cell.source === "measurement" ? element("small", { title: "one seed: the error is of the measurement alone" }, "¹") : null,
            cell.missing ? element("small", { class: "bad" }, ` ${cell.missing} missing`) : null);
        }),
        element("td", {}, String(row.seeds.length), row.failed ? element("small", { class: "bad" }, ` ${row.failed} failed`) : null));
      // Render the first rows immediately, the others when idle.
      const drawing = state.drawing = {};
      body.replaceChildren(...rows.slice(0, 60).map(show));
      const more = (i) => { if (state.drawing === drawing && i < rows.length) { body.append(...rows.slice(i, i + 60).map(show)); setTimeout(more, 0, i + 60); } };
      setTimeout(more, 0, 60);
      count.textContent = `${rows.length} of ${table.rows.length} rows`;
      if (focused != null) head.querySelectorAll("button").forEach((b) => { if (b.dataset.sort === focused) b.focus(); });
    }
    const count = element("span", { class: "faint", role: "status" });
    const filter = element("input", { type: "search", placeholder: "vae, sampler.steps=20 …", oninput: (event) => { state.filter = event.target.value; draw(false); } });
    const choice = element("details", {}, element("summary", {}, "Columns"), element("div", { class: "columns" }, ...table.columns.map((c) => element("label", {},
      element("input", { type: "checkbox", checked: shown.has(c.name), onchange: (event) => { event.target.checked ? shown.add(c.name) : shown.delete(c.name); draw(false); } }), ` ${c.label} `, element("span", { class: "faint" }, c.name)))));
    draw(false);
    return element("div", { class: "board" },
      element("h2", {}, table.data + (data.tables.length > 1 ? `, table ${index + 1}` : "")),
      table.why.length ? element("div", {}, element("p", { class: "bad" }, "Not comparable with an earlier table, because of different protocols:"), element("ul", {}, ...table.why.map((why) => element("li", {}, why)))) : null,
      element("p", {}, table.fairness.join(" ")),
      ...(table.certainty.length
        ? [
            element("details", {open: ""},
              element("summary", {}, "How certain are the ranks?"),
              element("ul", {}, ...table.certainty.map((sentence) => element("li", {}, sentence))),
            ),
          ]
        : []),
      element("div", { class: "tools" }, element("label", {}, "Filter ", filter), count, choice),
      element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Scores on ${table.data}` }, element("table", {}, head, body)),
      element("p", { class: "legend" }, "Mean ± standard error over seeds; ¹: one seed, the error is of the measurement alone. Green: the best of a column; pale green: rows without a significant difference to it (Welch test, 5 %, uncorrected for multiple comparisons) or without a standard error. Costs and means over two seeds are not tested; at least three seeds are needed. Columns in which noise may be best (precision, density, memorisation) have no best. ",
        "n/a: not supported by the family, or not measured. Click a number for its protocol and setting."));
  }
  $("#boards").append(...data.tables.map(board));
  if (!data.tables.length) $("#boards").append(element("p", {}, "No run is finished and scored yet."));

  // Samples: images are decoded when scrolled into view.
  // Images and Plotly follow this script, so that the table is shown first.
  const loaded = (work) => document.readyState === "complete" ? work() : addEventListener("load", work);
  const waiting = new Map();
  const observer = new IntersectionObserver((entries) => entries.filter((e) => e.isIntersecting).forEach((e) => { observer.unobserve(e.target); waiting.get(e.target)(); }), { rootMargin: "400px" });
  const seen = (node, draw) => { waiting.set(node, draw); observer.observe(node); };
  const grids = $("#samples .grids");
  for (const table of data.tables) for (const row of table.rows) {
    if (row.picture == null) continue;
    const image = element("img", { alt: `Samples of ${row.label} on ${table.data}` });
    seen(image, () => loaded(() => { image.src = "data:image/png;base64," + document.getElementById("picture-" + row.picture).textContent; }));
    grids.append(element("figure", {}, image, element("figcaption", {}, swatch(row.model), row.label + (data.tables.length > 1 ? `, ${table.data}` : ""))));
  }
  if (!grids.childElementCount) grids.append(element("p", {}, "No grid was drawn."));

  // Plots.
  const resolved = (name) => { const probe = element("span"); probe.style.color = `var(${name})`; document.body.append(probe); const value = getComputedStyle(probe).color; probe.remove(); return value; };
  function layout(x, y, extra = {}) {
    const axis = { gridcolor: resolved("--line"), zerolinecolor: resolved("--line"), automargin: true };
    return { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: resolved("--ink"), size: 13 }, margin: { l: 60, r: 15, t: 15, b: 50 }, hovermode: "closest",
      xaxis: { ...axis, ...x }, yaxis: { ...axis, ...y }, legend: { orientation: "h", y: -0.2 }, ...extra };
  }
  const settings = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };
  const redraws = [];
  const plot = (node, make) => {
    let ready = false;
    const draw = () => { if (ready) { const { traces, shape } = make(); Plotly.react(node, traces, shape, settings); } };
    seen(node, () => loaded(() => { ready = true; draw(); }));
    redraws.push(draw);
    return draw;
  };
  const select = (title, options, chosen, change) => {
    const node = element("select", { onchange: change }, ...options.map(([value, text]) => element("option", { value, selected: value === chosen }, text)));
    return [element("label", {}, title + " ", node), node];
  };
  const tick = (title, checked, change) => { const node = element("input", { type: "checkbox", checked, onchange: change }); return [element("label", {}, node, title), node]; };

  (() => { // quality against cost
    const section = $("#cost"), tools = $(".tools", section), node = $(".plot", section);
    if (!data.tables.length) { section.hidden = true; return; }
    let draw = () => {};
    const redraw = () => draw();
    const columns = (cost) => { const all = new Map(); for (const t of data.tables) for (const c of t.columns) if (c.cost === cost && c.better) all.set(c.name, c); return [...all.values()]; };
    const costs = columns(true), qualities = columns(false);
    // Speed as seconds per sample, by the delta method.
    const speed = costs.find((c) => c.name === "sampling/samples_per_second");
    if (speed) costs.push({ ...speed, name: "seconds per sample", label: "seconds per sample", unit: "s", better: "lower", inverse: speed.name });
    const cell = (row, column) => {
      const found = row.cells[column.inverse || column.name];
      if (!column.inverse || !(found?.mean > 0)) return column.inverse ? null : found;
      return { mean: 1 / found.mean, stderr: (found.stderr || 0) / found.mean ** 2, text: short(1 / found.mean) };
    };
    if (!costs.length || !qualities.length) { section.hidden = true; return; }
    const firstQuality = qualities.find((c) => c.headline) || qualities[0];
    const start = costs.find((c) => c.name === (firstQuality.name.startsWith("text/") ? "seconds per sample" : "sampling/samples_per_second")) || costs[0];
    const [tableLabel, table] = select("Table", data.tables.map((t, i) => [String(i), `${t.data} (${i + 1})`]), "0", redraw);
    const [yLabel, y] = select("Quality", qualities.map((c) => [c.name, c.label]), firstQuality.name, redraw);
    const [xLabel, x] = select("Cost", costs.map((c) => [c.name, c.label]), start.name, redraw);
    const [logXLabel, logX] = tick("log x", true, redraw), [logYLabel, logY] = tick("log y", firstQuality.unit !== "share", redraw);
    tools.append(...(data.tables.length > 1 ? [tableLabel] : []), yLabel, xLabel, logXLabel, logYLabel);
    draw = plot(node, () => {
      const chosen = data.tables[+table.value], q = chosen.columns.find((c) => c.name === y.value), c = costs.find((d) => d.name === x.value);
      const points = !q || !c ? [] : chosen.rows.filter((row) => row.cells[q.name]?.mean != null && cell(row, c)?.mean != null)
        .map((row) => ({ row, x: cell(row, c).mean, y: row.cells[q.name].mean, ex: cell(row, c).stderr || 0, ey: row.cells[q.name].stderr || 0 }));
      const better = (column, a, b) => column.better === "higher" ? a >= b : a <= b;
      const beats = (a, b) => better(c, a.x, b.x) && better(q, a.y, b.y) && (a.x !== b.x || a.y !== b.y);
      const front = points.filter((p) => !points.some((other) => beats(other, p))).sort((a, b) => a.x - b.x);
      const text = (p) => `${plain(p.row.label)}<br>${plain(q.label)} ${plain(p.row.cells[q.name].text)}<br>${plain(c.label)} ${plain(cell(p.row, c).text)}`;
      const traces = [];
      const nets = new Map();
      for (const p of points) { const id = JSON.stringify([p.row.trained, p.row.setting["sampler.name"]]); nets.set(id, [...(nets.get(id) || []), p]); }
      for (const net of nets.values()) if (net.length > 1) {
        net.sort((a, b) => a.x - b.x);
        traces.push({ x: net.map((p) => p.x), y: net.map((p) => p.y), mode: "lines", line: { color: colour(net[0].row.model), width: 1, dash: "dot" }, hoverinfo: "skip", showlegend: false });
      }
      if (front.length) traces.push({ x: front.map((p) => p.x), y: front.map((p) => p.y), mode: "lines", line: { color: resolved("--faint"), width: 2, shape: "linear" }, name: "Pareto front", hoverinfo: "skip" });
      for (const model of families) {
        const own = points.filter((p) => p.row.model === model);
        if (!own.length) continue;
        traces.push({ x: own.map((p) => p.x), y: own.map((p) => p.y), error_x: { type: "data", array: own.map((p) => p.ex), thickness: 1 }, error_y: { type: "data", array: own.map((p) => p.ey), thickness: 1 },
          mode: own.length <= 3 && points.length <= 30 ? "markers+text" : "markers", text: own.map((p) => plain(p.row.model)), textposition: "top center", cliponaxis: false, hovertext: own.map(text), hoverinfo: "text", name: plain(model),
          marker: { color: colour(model), size: own.map((p) => front.includes(p) ? 13 : 9), line: { color: resolved("--ink"), width: own.map((p) => front.includes(p) ? 2 : 0) }, symbol: own.map((p) => front.includes(p) ? "diamond" : "circle") } });
      }
      const note = points.length ? [] : [{ text: "No row has both.", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 }];
      return { traces, shape: layout({ title: { text: plain(c ? `${c.label} (${c.unit})` : x.value) }, type: logX.checked ? "log" : "linear" }, { title: { text: plain(q ? `${q.label} (${q.unit})` : y.value) }, type: logY.checked ? "log" : "linear" }, { annotations: note }) };
    });
  })();

  (() => { // quality against diversity by guidance
    const section = $("#guidance"), tools = $(".tools", section), node = $(".plot", section);
    const networks = []; // { table, model, label, points: [[scale, row]] }
    for (const table of data.tables) {
      const plainRows = new Map(), groups = new Map();
      const decisive = (name, keep) => name === "weights" || (name.startsWith("sampler.") && !name.startsWith("sampler.instead_of")) || (keep && name.startsWith("guidance.") && name !== "guidance.scale");
      const key = (row, keep) => JSON.stringify([row.trained, Object.entries(row.setting).filter(([name]) => decisive(name, keep)).sort()]);
      for (const row of table.rows) {
        if (row.setting["guidance.scale"] == null) { plainRows.set(key(row, false), row); continue; }
        const id = key(row, true);
        if (!groups.has(id)) groups.set(id, { table, model: row.model, first: row, points: [] });
        groups.get(id).points.push([row.setting["guidance.scale"], row]);
      }
      for (const group of groups.values()) {
        const unguided = plainRows.get(key(group.first, false));
        if (unguided && group.first.setting["guidance.name"] !== "ClassifierGuidance") group.points.push([1, unguided]);
        group.points.sort((a, b) => a[0] - b[0]);
        if (group.points.length > 1) networks.push(group);
      }
    }
    if (!networks.length) { section.hidden = true; $("nav a[href='#guidance']").remove(); return; }
    const columns = new Map();
    for (const group of networks) for (const c of group.table.columns) if (!c.cost && c.better && group.points.filter(([, row]) => row.cells[c.name]?.mean != null).length > 1) columns.set(c.name, c);
    const options = [...columns.values()], find = (...patterns) => patterns.map((p) => options.find((c) => p.test(c.name))).find(Boolean) || options[0];
    let draw = () => {};
    const redraw = () => draw();
    const [yLabel, y] = select("Quality", options.map((c) => [c.name, c.label]), find(/class_accuracy/, /precision/)?.name, redraw);
    const [xLabel, x] = select("Diversity", options.map((c) => [c.name, c.label]), find(/recall_per_class/, /test\/recall/, /recall/)?.name, redraw);
    tools.append(yLabel, xLabel);
    draw = plot(node, () => {
      const q = columns.get(y.value), d = columns.get(x.value);
      const kind = { ClassifierFreeGuidance: "classifier-free", AutoGuidance: "by a worse model", ClassifierGuidance: "by a classifier" };
      const traces = networks.map((group) => {
        const points = group.points.filter(([, row]) => row.cells[q.name]?.mean != null && row.cells[d.name]?.mean != null);
        const of = (name, part) => points.map(([, row]) => row.cells[name][part] || 0);
        const interval = group.first.setting["guidance.interval"];
        const name = `${group.model}, ${kind[group.first.setting["guidance.name"]] || group.first.setting["guidance.name"]}` + (interval ? ` on ${short(interval)}` : "") + (data.tables.length > 1 ? `, ${group.table.data}` : "");
        return { x: of(d.name, "mean"), y: of(q.name, "mean"), error_x: { type: "data", array: of(d.name, "stderr"), thickness: 1 }, error_y: { type: "data", array: of(q.name, "stderr"), thickness: 1 },
          mode: "lines+markers+text", text: points.map(([scale]) => String(short(scale))), textposition: "top center", cliponaxis: false, name: plain(name), line: { color: colour(group.model) },
          hovertext: points.map(([scale, row]) => `${plain(name)}, scale ${plain(short(scale))}<br>${plain(q.label)} ${plain(row.cells[q.name].text)}<br>${plain(d.label)} ${plain(row.cells[d.name].text)}`), hoverinfo: "text" };
      });
      return { traces, shape: layout({ title: { text: plain(`${d.label} (${d.unit})`) } }, { title: { text: plain(`${q.label} (${q.unit})`) } }, { showlegend: true }) };
    });
  })();

  // Curves.
  const axes = [["images", "images seen"], ["seconds", "seconds of training"], ["flops", "training FLOPs"]];
  const kinds = [...new Set(data.series.flatMap((s) => Object.keys(s.y)))].sort((a, b) => a.startsWith("train/") - b.startsWith("train/") || a.localeCompare(b));
  let along = () => "images";
  const lines = (name, series, label) => {
    const labelled = new Set();
    return series.filter((s) => s.y[name]).map((s) => {
      const first = !labelled.has(s.label); labelled.add(s.label);
      return { x: s.x[s.y[name].k][along()], y: s.y[name].v, mode: "lines" + (s.y[name].v.length < 8 ? "+markers" : ""), line: { color: label ? undefined : colour(s.model), width: 1.4 }, name: plain(label || s.label), legendgroup: s.label, showlegend: first,
        hovertemplate: `${plain(label || s.label)}, seed ${plain(s.seed)}<br>%{x:.4g}: %{y:.5g}<extra></extra>` };
    });
  };
  (() => {
    const section = $("#curves"), tools = $(".tools", section), node = $(".plot", section);
    if (!kinds.length) { section.hidden = true; return; }
    const all = () => redraws.forEach((draw) => draw());
    const sets = [...new Set([...data.tables.map((t) => t.data), ...data.series.map((s) => s.data)])];
    const has = (name, k) => data.series.some((s) => s.data === name && s.y[k]);
    const usual = (name) => kinds.find((k) => /^test\/(fid|fd_)/.test(k) && has(name, k)) || kinds.find((k) => has(name, k)) || kinds[0];
    const [setLabel, set] = select("Data", sets.map((name) => [name, name]), sets[0], () => { if (!has(set.value, kind.value)) kind.value = usual(set.value); all(); });
    const [kindLabel, kind] = select("Curve of", kinds.map((k) => [k, data.labels[k] || k]), usual(sets[0]), all);
    const [axisLabel, axis] = select("against", axes, "images", all);
    const [xLogLabel, xLog] = tick("log x", false, all), [yLogLabel, yLog] = tick("log y", false, all);
    along = () => axis.value;
    tools.append(...(sets.length > 1 ? [setLabel] : []), kindLabel, axisLabel, xLogLabel, yLogLabel);
    plot(node, () => ({ traces: lines(kind.value, data.series.filter((s) => s.data === set.value)), shape: layout({ title: { text: axes.find(([a]) => a === axis.value)[1] }, type: xLog.checked ? "log" : "linear" }, { title: { text: plain(kind.value) }, type: yLog.checked ? "log" : "linear" }) }));
  })();

  // Diagnostics: terms that differ by a number at their end share a chart.
  const diagnostics = $("#diagnostics");
  let charts = 0;
  const studies = families.flatMap((model) => [...new Set(data.series.filter((s) => s.model === model).map((s) => s.data))].map((set) => [model, set]));
  for (const [model, set] of studies) {
    const own = data.series.filter((s) => s.model === model && s.data === set);
    const groups = new Map();
    for (const [name, about] of Object.entries(data.diagnostics[model] || {})) {
      if (!own.some((s) => s.y[name])) continue;
      const stem = name.replace(/_\d+$/, "_#");
      groups.set(stem, [...(groups.get(stem) || []), [name, about]]);
    }
    if (!groups.size) continue;
    const box = element("div", { class: "charts" });
    diagnostics.append(element("h3", {}, swatch(model), data.tables.length > 1 ? `${model}, ${set}` : model), box);
    for (const members of groups.values()) {
      charts += 1;
      const several = members.length > 1, [, about] = members[0];
      const title = (several ? about.label.replace(/\d+/, "…") : about.label) + (about.unit ? ` (${about.unit})` : "") + (about.better ? `, ${about.better} is better` : "");
      const node = element("div", { class: "plot", role: "img", "aria-label": `${model}: ${title}` });
      box.append(element("figure", {}, element("figcaption", {}, title), node));
      plot(node, () => ({
        traces: members.flatMap(([name], i) => lines(name, several ? own.slice(0, 1) : own, several ? name.match(/\d+$/)[0] : null).map((t) => several ? { ...t, line: { ...t.line, color: palette[i % palette.length] }, showlegend: true, legendgroup: name } : { ...t, showlegend: false })),
        shape: layout({ title: { text: along() } }, {}, { margin: { l: 50, r: 10, t: 8, b: 40 }, legend: { orientation: "h", y: 1.15 } }),
      }));
    }
  }
  if (!charts) diagnostics.hidden = true;

  // Runs.
  $("#runs").append(...[
    data.unfinished.length ? element("div", {}, element("h3", {}, "Not finished"), element("ul", {}, ...data.unfinished.map((line) => element("li", { class: "bad" }, line)))) : null,
    element("details", {}, element("summary", {}, `${data.commands.length} commands`), element("pre", {}, data.commands.join("\n")))].filter(Boolean));

  // Light and dark.
  const dark = () => document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  $("#theme").addEventListener("click", () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; redraws.forEach((draw) => draw()); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraws.forEach((draw) => draw()));
})();
