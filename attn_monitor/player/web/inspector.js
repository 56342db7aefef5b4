// What the chosen patch and the chosen head hold: weights in every head, history over steps, prefix tokens, facts.
import {makeChart} from "./charts.js";
import {cosines, grouped, percent, written} from "./numbers.js";
import {patchIn} from "./places.js";
import {atOf, chosenPatch, classOf, now, pinned, runA, shownLayer, view} from "./view.js";
import {columnsShown} from "./stage.js";
import {el, headName} from "./tiles.js";

const HISTORY = 60; // snapshots whose blocks are fetched for it, evenly spaced

export function makeInspector() {
  const where = el("h3", {}), hint = el("p", {class: "hint reading"}), bars = el("div", {class: "bars"});
  const cosine = el("p", {class: "hint", hidden: true});
  const history = makeChart("history", "weight of the patch over steps"), over = el("p", {class: "hint"});
  const tokens = el("div", {class: "tokens"}), tokensTitle = el("h3", {});
  const facts = el("dl", {class: "facts"});
  const patch = el("section", {class: "card patch", "aria-label": "patch"}, where, hint, bars, cosine, history.element, over);
  const prefix = el("section", {class: "card", "aria-label": "prefix tokens"}, tokensTitle, tokens);
  const about = el("details", {class: "card about"}, el("summary", {}, "About this layer"), facts);
  const element = el("div", {class: "inspector"}, patch, prefix, about);
  let curves = [], known = ""; // of the history, and what they were made for

  function draw() {
    const chosen = chosenPatch(), columns = columnsShown().flatMap(partsOfColumn);
    drawPatch(chosen, columns);
    drawTokens(columns);
    drawFacts(facts, columns);
  }

  function drawPatch(chosen, columns) {
    const grid = columns[0]?.entry.grid, patchOf = ({entry}) => patchIn(entry.place, chosen);
    const first = chosen && grid ? patchOf(columns[0]) : -1, there = first >= 0;
    patch.classList.toggle("empty", !there);
    where.textContent = there ? `Patch ${Math.floor(first / grid[1])}, ${first % grid[1]}` : "Patch";
    hint.replaceChildren(...there ? ["× uniform", ...columns.map(({role, side, title}) => el("span", {class: `value ${classOf(role)}${side ? " other" : ""}`}, title))]
      : ["Point at a picture to read one patch; click to keep it."]);
    bars.hidden = history.element.hidden = over.hidden = !there;
    cosine.hidden = true;
    if (!there) return;
    const weights = columns.map(column => Array.from({length: column.entry.heads + 1}, (_, i) =>
      column.run.weight(column.at, column.role, column.layer, chosen.image, i - 1, patchOf(column))));
    drawBars(bars, columns, weights);
    drawCosine(chosen, columns);
    drawHistory(chosen, columns);
  }

  function drawCosine(chosen, columns) {
    const {part} = columns[0] ?? {};
    if (!part?.width || view.pin < 0 || chosen.image !== view.image) return;
    cosine.hidden = false;
    cosine.textContent = "cosine to the chosen patch: " + columns.filter(({part}) => part.width).map(({title, part, entry}) =>
      `${title} ${written(cosines(part.features(chosen.image), part.width, patchIn(entry.place, pinned()))[patchIn(entry.place, chosen)])}`).join(", ");
  }

  function drawHistory(chosen, columns) {
    const wanted = JSON.stringify([chosen, view.head, columns.map(c => [c.title, c.layer, c.run.name, c.run.kept.size, c.run.steps.length])]);
    if (wanted !== known) {
      known = wanted;
      const patchAt = entry => entry ? patchIn(entry.place, chosen) : -1;
      curves = columns.map(({run, layer, role, side}) => ({
        className: `${classOf(role)} mean${side ? " other" : ""}`, dotted: true, id: wanted,
        points: run.steps.map((step, at) => [step.step, run.weight(at, role, layer, chosen.image, view.head, patchAt(run.entry(at, role, layer)))])
          .filter(point => Number.isFinite(point[1])),
      }));
    }
    const steps = runA().steps;
    history.draw(curves, [steps[0].step, steps.at(-1).step], steps[now.at].step, value => `${written(value)}×`);
    over.textContent = `${headName(view.head)} over steps ${grouped(steps[0].step)} to ${grouped(steps.at(-1).step)}`;
  }

  function drawTokens(columns) {
    const shown = columns.filter(({part}) => part.prefix > 0);
    prefix.hidden = shown.length === 0;
    if (prefix.hidden) return;
    tokensTitle.textContent = `Prefix tokens, ${headName(view.head)}`;
    const rows = shown.flatMap(({run, at, layer, role, title, side, entry}) =>
      run.prefixes(at, role, layer, view.image, view.head).map((share, token) => ({
        name: `${title} ${entry.cls ? token ? `register ${token}` : "CLS" : `token ${token}`}`, share, className: `${classOf(role)}${side ? " other" : ""}`,
      })));
    replaceRows(tokens, rows.map(row => row.name), (parts, i) => fill(parts, rows[i].name, rows[i].share, percent(rows[i].share), rows[i].className));
  }
  return {element, draw};
}

function partsOfColumn(column) {
  return column.runs.flatMap((run, index) => {
    const at = atOf(run), layer = shownLayer(run), entry = run.entry(at, column.role, layer);
    const part = run.peek(at, layer)?.[column.role];
    const title = column.runs.length > 1 ? `${column.role} ${"AB"[index]}` : column.title;
    return entry && part ? [{run, at, layer, entry, part, role: column.role, title, side: column.side ?? index}] : [];
  });
}

// A row for each head, a bar for each role; all on one scale, whose end is told by the numbers.
function drawBars(bars, columns, weights) {
  const most = Math.max(4, ...weights.flat().filter(Number.isFinite));
  const rows = weights[0]?.flatMap((_, i) => columns.map((column, c) => ({i, c, column}))) ?? [];
  replaceRows(bars, rows.map(({i, column}) => `${column.title} ${i}`), (parts, r) => {
    const {i, c, column} = rows[r], value = weights[c][i];
    const label = c ? "" : i ? `head ${i - 1}` : "mean";
    fill(parts, label, value / most, Number.isFinite(value) ? `${written(value)}×` : "–", `${classOf(column.role)}${column.side ? " other" : ""}`);
    parts.row.classList.toggle("first", c === 0);
    parts.row.classList.toggle("chosen", i - 1 === view.head);
    parts.row.title = `${column.title}, ${headName(i - 1)}`;
  });
}

// Rows of a label, a bar and a number, made anew only where they are others.
function replaceRows(element, keys, draw) {
  const wanted = keys.join("|");
  if (element.dataset.rows !== wanted) {
    element.dataset.rows = wanted;
    element.replaceChildren(...keys.map(() => el("div", {class: "row"}, el("span", {class: "label"}), el("span", {class: "bar"}, el("i")), el("span", {class: "number"}))));
  }
  [...element.children].forEach((row, i) => draw({row, label: row.children[0], bar: row.children[1].firstChild, number: row.children[2]}, i));
}

function fill({row, label, bar, number}, name, share, text, className) {
  row.className = `row ${className}`;
  label.textContent = name;
  bar.style.width = `${100 * Math.max(0, Math.min(1, Number.isFinite(share) ? share : 0))}%`;
  number.textContent = text;
}

function drawFacts(facts, columns) {
  const told = columns.flatMap(({title, entry, run}) => [
    [title, `${entry.model || "model"}, ${entry.name}`],
    ["rows are", `${entry.kind === "distribution" ? "distributions" : entry.kind}${entry.mixed ? ", mixed" : ""}`],
    ["query", entry.query || "not told"], ["places known", entry.places || "not told"],
    ["patches", `${entry.grid[0]} × ${entry.grid[1]}${entry.geometry ? placeInWords(entry.place) : ""}`],
  ]);
  const text = JSON.stringify(told);
  if (facts.dataset.text === text) return;
  facts.dataset.text = text;
  facts.replaceChildren(...told.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

const placeInWords = ({origin, cell}) =>
  ` of ${cell.map(side => written(side)).join(" × ")} pixels, the first at ${origin.map(pixels => written(pixels)).join(", ")}`;

// Steps whose blocks the history needs, evenly spaced, the shown one first.
export function stepsOfHistory(run) {
  const count = run.steps.length, every = Math.max(1, Math.ceil(count / HISTORY));
  return [...Array(count).keys()].filter(at => at % every === 0 || at === count - 1);
}
