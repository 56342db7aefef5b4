// The list of all runs: a table that a click sorts, and the curves of all runs on top of each other.
import { changeDetector, el } from "./elements.js";
import { LineChart, rangeOf } from "./line_chart.js";
import { manifest } from "./manifest.js";
import { formatted, grouped } from "./numbers.js";
import { openedRun, openRun, runNames } from "./runs.js";
import { showError, showStatus } from "./status.js";
import { chipOf, kindOf, latestVerdict } from "./verdict.js";
import { change, view } from "./view.js";

/** @import {Curve, Pair, Verdict} from "./types" */
/** @import {Run} from "./run.js" */

const SHOWN = ["knn_accuracy", "ridge_accuracy", "rankme", "dense_separability", "entropy", "loss"]; // where they exist
const LOOKS = 7; // colours of curves; with more runs they are dashed

/** @typedef {{run: Run, values: Record<string, number | null>, curves: Record<string, Curve["points"]>}} Row */
/** @typedef {{key: string, title: string, valueOf: (row: Row) => string | number | null, cellOf: (row: Row) => HTMLElement}} TableColumn */

export function makeRunList() {
  const hint = el("p", { class: "hint" });
  const more = el("select", { "aria-label": "add a metric", onchange: () => addMetric(more.value) });
  const at = el("select", { "aria-label": "values of", onchange: () => change({ at: at.value }) });
  at.append(el("option", { value: "last" }, "last snapshot"), el("option", { value: "pick" }, "pick for dense use"));
  const table = el("table", {});
  const charts = el("div", { class: "run-charts" });
  const controls = el("div", { class: "run-controls" }, hint, at, more);
  const element = el("section", { class: "run-list" }, controls, el("div", { class: "wide" }, table), charts);
  /** @type {Map<string, {chart: LineChart, curves: Curve[]}>} */
  let drawn = new Map();
  /** @type {Pair} */
  let domain = [0, 0];
  const rowsChanged = changeDetector();
  /** @type {Run[]} */
  let runs = [];
  let loading = "";

  /** @param {string} name */
  function addMetric(name) {
    const metrics = shownMetrics(rowsOf(runs));
    change({ columns: [...metrics, name].join(",") });
  }

  async function load() {
    const names = runNames();
    if (loading === names.join("\n")) return;
    loading = names.join("\n");
    const found = [];
    for (const name of names) {
      try {
        found.push(await openedRun(name));
      } catch (error) {
        showStatus(`${name}: ${/** @type {Error} */ (error).message}`);
      }
      runs = [...found];
      change({});
    }
  }

  function draw() {
    element.hidden = !view.list;
    document.body.classList.toggle("listing", view.list);
    if (!view.list) return;
    load().catch(showError);
    if (rowsChanged(view.by, view.at, view.columns, runs, ...runs.map(({ steps }) => steps))) drawRows();
    for (const [name, { chart, curves }] of drawn) chart.draw(curves, domain, NaN, formatted, rangeOf(name));
  }

  function drawRows() {
    const rows = rowsOf(runs);
    const metrics = shownMetrics(rows);
    const columns = columnsOf(rows, metrics);
    const picked = rows.some(({ run }) => run.facts.found);
    at.value = view.at;
    at.hidden = !picked;
    hint.textContent = `${rows.length} runs. A click on a title sorts, one on a run opens it. Values are of ${
      view.at === "pick" && picked ? "the pick for dense use" : "the last snapshot"
    }, of the teacher where there is one.`;
    const others = metricsOf(rows).filter((name) => !metrics.includes(name));
    const options = others.map((name) => el("option", { value: name }, name.replaceAll("_", " ")));
    more.replaceChildren(el("option", { value: "" }, "add a metric …"), ...options);
    more.hidden = !others.length;
    const body = sorted(rows, columns).map((row) => el("tr", {}, ...columns.map(({ cellOf }) => cellOf(row))));
    table.replaceChildren(el("thead", {}, el("tr", {}, ...columns.map(headOf))), el("tbody", {}, ...body));
    domain = domainOf(rows);
    drawn = new Map(metrics.map((name) => [name, { chart: chartOf(name), curves: curvesOf(rows, name) }]));
    const steps = ` over steps ${domain.map(grouped).join(" to ")}`;
    const figures = [...drawn].map(([name, { chart }]) => {
      const caption = el("figcaption", {}, name.replaceAll("_", " "), el("span", { class: "hint" }, steps));
      return el("figure", { "data-metric": name }, caption, chart.element);
    });
    charts.replaceChildren(...figures);
  }
  return { element, draw };
}

/** @param {string} name */
const chartOf = (name) => new LineChart("of-runs", `${name.replaceAll("_", " ")} of all runs`);

/** @type {(rows: Row[], name: string) => Curve[]} */
const curvesOf = (rows, name) =>
  rows.map(({ curves }, i) => ({ className: lookOf(i), points: curves[name] ?? [], dotted: false }));

/** @param {number} i */
const lookOf = (i) => `run-${i % LOOKS}${i >= LOOKS ? " other" : ""}`;

/**
 * @param {Row[]} rows
 * @returns {Pair}
 */
function domainOf(rows) {
  const steps = rows.flatMap(({ run }) => [run.steps[0].step, run.steps[run.steps.length - 1].step]);
  return [Math.min(...steps), Math.max(...steps)];
}

/** @type {(runs: Run[]) => Row[]} */
const rowsOf = (runs) => runs.map((run) => ({ run, ...measuresOf(run) }));

/**
 * Metrics of the teacher's last layer, else of the last role's, of its whole model, and of training.
 * @param {Run} run
 */
function measuresOf(run) {
  const layout = run.layout(run.steps.length - 1);
  const role = layout.some((layer) => layer.role === "teacher") ? "teacher" : layout[layout.length - 1].role;
  const layer = Math.max(...layout.filter((found) => found.role === role).map((found) => found.layer));
  /** @type {Record<string, Curve["points"]>} */
  const curves = {};
  for (const { step, metrics } of run.steps) {
    for (const [key, [value]] of Object.entries(metrics)) {
      const [of, where, name] = key.split("/");
      const isShown = of === "training" || (of === role && (where === "model" || Number(where) === layer));
      if (isShown && value !== null) (curves[name] ??= []).push([step, value]);
    }
  }
  const step = view.at === "pick" ? (run.facts.found?.dense ?? null) : run.steps[run.steps.length - 1].step;
  const values = Object.entries(curves).map(([name, points]) => {
    return /** @type {const} */ ([name, points.find((point) => point[0] === step)?.[1] ?? null]);
  });
  return { curves, values: Object.fromEntries(values) };
}

/** @param {Row[]} rows */
const metricsOf = (rows) => [...new Set(rows.flatMap(({ curves }) => Object.keys(curves)))];

/** @param {Row[]} rows */
function shownMetrics(rows) {
  const wanted = view.columns ? view.columns.split(",") : (manifest.list?.columns ?? SHOWN);
  const known = metricsOf(rows);
  return wanted.filter((name) => known.includes(name));
}

/**
 * @param {Row[]} rows
 * @param {string[]} metrics
 * @returns {TableColumn[]}
 */
function columnsOf(rows, metrics) {
  const places = new Map(rows.map(({ run }, i) => [run, i]));
  /** @type {(key: string, title: string, valueOf: (row: Row) => number | null, show?: (value: number) => string) => TableColumn} */
  const numbers = (key, title, valueOf, show = formatted) => {
    const cellOf = (/** @type {Row} */ row) => {
      const value = valueOf(row);
      return el("td", { class: "n" }, value === null ? "" : show(value));
    };
    return { key, title, valueOf, cellOf };
  };
  /** @type {TableColumn} */
  const name = {
    key: "run",
    title: "run",
    valueOf: ({ run }) => run.name,
    cellOf: ({ run }) => {
      const open = el("button", { type: "button", class: "open", onclick: () => show(run) }, run.name);
      const key = el("span", { class: `run-key ${lookOf(places.get(run) ?? 0)}`, "aria-hidden": "true" });
      return el("th", { scope: "row" }, key, open);
    },
  };
  /** @type {TableColumn} */
  const verdict = {
    key: "verdict",
    title: "verdict",
    valueOf: ({ run }) => stateOf(run)?.state ?? null,
    cellOf: ({ run }) => {
      const found = stateOf(run);
      const since = found && kindOf(found) === "bad" && found.since !== null ? ` since ${grouped(found.since)}` : "";
      return el("td", {}, ...(found ? [chipOf(found), since] : []));
    },
  };
  /** @type {(use: "dense" | "global") => TableColumn} */
  const picks = (use) => ({
    key: use,
    title: `for ${use} use`,
    valueOf: ({ run }) => run.facts.found?.[use] ?? null,
    cellOf: ({ run }) => {
      const step = run.facts.found?.[use] ?? null;
      if (step === null) return el("td", {});
      const title = use === "dense" ? (run.facts.found?.certainty ?? "") : "";
      const attributes = { type: "button", class: "open", title, onclick: () => show(run, step) };
      return el("td", { class: "n" }, el("button", attributes, grouped(step)));
    },
  });
  const picked = rows.some(({ run }) => run.facts.found);
  return [
    name,
    numbers("step", "last step", ({ run }) => run.steps[run.steps.length - 1].step, grouped),
    verdict,
    numbers("flags", "flags", ({ run }) => run.steps.reduce((sum, { flags }) => sum + flags.length, 0), String),
    ...(picked ? [picks("dense"), picks("global")] : []),
    ...(picked ? [numbers("pick", "pick", ({ run }) => run.facts.found?.pick ?? null)] : []),
    ...metrics.map((metric) => numbers(metric, metric.replaceAll("_", " "), ({ values }) => values[metric] ?? null)),
  ];
}

/**
 * The verdict of a run: that of its last snapshot, or where it has another or none by now, what Python found.
 * @param {Run} run
 * @returns {Verdict | undefined}
 */
function stateOf(run) {
  const last = latestVerdict(run);
  const state = run.facts.found?.verdict;
  if (!state || state === last?.state) return last;
  return { state, since: null, evidence: [], advice: "" };
}

/**
 * @param {Run} run
 * @param {number | null} step
 */
function show(run, step = null) {
  change({ list: false });
  openRun(run.name, step).catch(showError);
}

/** @param {TableColumn} column */
function headOf({ key, title }) {
  const descending = view.by === key;
  const sort = descending ? "descending" : view.by === `-${key}` ? "ascending" : null;
  const onclick = () => change({ by: descending ? `-${key}` : key });
  return el("th", { scope: "col", "aria-sort": sort }, el("button", { type: "button", onclick }, title));
}

/**
 * Rows by the column of the link, those without a value last.
 * @param {Row[]} rows
 * @param {TableColumn[]} columns
 */
function sorted(rows, columns) {
  const ascending = view.by.startsWith("-");
  const column = columns.find(({ key }) => key === (ascending ? view.by.slice(1) : view.by));
  if (!column) return rows;
  return rows.toSorted((a, b) => {
    const [x, y] = [column.valueOf(a), column.valueOf(b)];
    if (x === null || y === null) return Number(x === null) - Number(y === null);
    const order = typeof x === "string" ? x.localeCompare(String(y)) : x - Number(y);
    return ascending ? order : -order;
  });
}
