// The pictures: a column for each role (and run), with one large map and the heads below, or all images at once.
import {drawBar, SCALES} from "./colours.js";
import {entropyOf, grouped, percent} from "./numbers.js";
import {atOf, change, classOf, now, rolesOf, runA, runB, shownLayer, view} from "./view.js";
import {drawTile, el, makeTile, runDot} from "./tiles.js";

// What stands side by side: roles, of both runs where there are two; together where they are swiped or subtracted.
export function columnsShown() {
  const a = runA(), b = runB();
  return rolesOf(a).filter(role => a.entry(now.at, role, shownLayer())).flatMap(role => {
    if (!b) return [{key: role, title: role, role, runs: [a]}];
    if (view.compare !== "side") return [{key: role, title: role, role, runs: [a, b]}];
    return [a, b].map((run, index) => ({key: `${role} ${index}`, title: `${role} · ${"AB"[index]}`, role, runs: [run], side: index}));
  });
}

export function makeStage() {
  const pictures = el("div", {class: "pictures"}), bar = el("canvas", {class: "bar", "aria-hidden": "true"});
  const ticks = el("div", {class: "ticks"}), unit = el("span", {class: "unit"}), keys = el("span", {class: "keys"});
  const legend = el("div", {class: "legend", role: "group", "aria-label": "legend"}, el("div", {class: "scale"}, bar, ticks), unit, keys);
  const element = el("section", {class: "stage", "aria-label": "attention maps"}, legend, pictures);
  let built = "", draws = [], tiles = [];

  function draw() {
    const columns = columnsShown(), heads = headsOf(columns);
    const wanted = JSON.stringify([columns.map(c => c.key), heads, view.all, view.arrange, runA().images.length, now.runs.map(run => run.name)]);
    if (wanted !== built) {
      built = wanted;
      pictures.className = `pictures ${view.all ? "gallery" : view.arrange} columns${columns.length}`;
      [draws, tiles] = view.all ? buildGallery(pictures, columns) : buildColumns(pictures, columns, heads);
    }
    for (const tile of tiles) tile.width = tile.canvas.clientWidth; // before anything changes: the page is laid out once
    const order = view.sort === "entropy" && !view.all ? byEntropy(columns, heads) : [...Array(heads).keys()];
    for (const drawPart of draws) drawPart(columns, order);
    drawLegend(bar, ticks, unit, keys);
  }
  return {element, pictures, legend, draw};
}

const headsOf = columns => Math.max(0, ...columns.flatMap(c => c.runs.map(r => r.entry(atOf(r), c.role, shownLayer(r))?.heads ?? 0)));

// Heads by their mean entropy over the columns, the sharpest first: the same order in all, as heads correspond.
function byEntropy(columns, heads) {
  const total = head => columns.reduce((sum, {runs: [run], role}) => {
    const values = run.map(atOf(run), role, shownLayer(run), view.image, head);
    return sum + (values ? entropyOf(values) : 0);
  }, 0);
  const totals = Array.from({length: heads}, (_, head) => total(head));
  const rank = value => Number.isNaN(value) ? Infinity : value;
  return [...totals.keys()].sort((a, b) => rank(totals[a]) - rank(totals[b]) || a - b);
}

// How each part is drawn, and the tiles among them.
function buildColumns(pictures, columns, heads) {
  const draws = [], tiles = [];
  pictures.replaceChildren(...columns.map((column, index) => {
    const title = el("h2", {}, column.title), detail = el("span", {class: `detail ${runB() ? "of-two" : ""}`});
    const section = el("section", {class: "column", "aria-label": column.title}, el("header", {}, marker(column), title, detail));
    draws.push(columns => detail.textContent = detailOf(columns[index]));
    if (view.arrange !== "grid") {
      const tile = makeTile({large: true});
      section.append(tile.element);
      tiles.push(tile);
      draws.push(columns => drawTile(tile, columns[index], view.image, view.head, {large: true}));
    }
    if (view.arrange !== "single" && heads) section.append(headTiles(index, heads, draws, tiles));
    return section;
  }));
  return [draws, tiles];
}

function marker(column) {
  return column.side === undefined ? el("span", {class: `dot ${classOf(column.role)}`, "aria-hidden": "true"}) : runDot(column.side);
}

const modelOf = (run, role) => run.entry(atOf(run), role, shownLayer(run))?.model ?? "";

function detailOf({runs, role, side}) {
  const differ = new Set(now.runs.map(run => shownLayer(run))).size > 1;
  const told = runs.map(run => `step ${grouped(run.steps[atOf(run)].step)}${differ ? `, layer ${shownLayer(run)}` : ""}`);
  if (runs.length > 1) return `A ${told[0]} · B ${told[1]}`;
  return side === undefined ? modelOf(runs[0], role) : told[0];
}

function headTiles(index, heads, draws, all) {
  const tiles = Array.from({length: heads}, (_, head) => makeTile({onpick: () => change({head: view.head === head ? -1 : head, arrange: view.arrange})}));
  const list = el("div", {class: "heads", role: "group", "aria-label": "heads"}, ...tiles.map(tile => tile.element));
  const grid = view.arrange === "grid";
  const across = grid ? Math.max(2, Math.ceil(Math.sqrt(heads))) : heads <= 4 ? 4 : heads % 6 && heads <= 16 && heads % 4 === 0 ? heads / 2 : 6;
  list.style.setProperty("--across", Math.min(across, 8));
  all.push(...tiles);
  let shown = "";
  draws.push((columns, order) => {
    if (shown !== String(order)) {
      shown = String(order);
      list.append(...order.map(head => tiles[head].element));
    }
    tiles.forEach((tile, head) => {
      tile.element.setAttribute("aria-pressed", String(view.head === head));
      drawTile(tile, columns[index], view.image, head);
    });
  });
  return list;
}

function buildGallery(pictures, columns) {
  const draws = [], tiles = [];
  pictures.replaceChildren(...runA().images.map((image, number) => {
    const row = el("div", {class: "pair"}, ...columns.map((column, index) => {
      const tile = makeTile({onpick: () => change({all: false, image: number})});
      tiles.push(tile);
      draws.push(columns => drawTile(tile, columns[index], number, view.head));
      return el("div", {}, el("span", {class: "small"}, column.title), tile.element);
    }));
    return el("section", {class: "item", "aria-label": image.name}, el("h2", {}, image.name), row);
  }));
  return [draws, tiles];
}

// The scale that the large maps have now.
export function scaleShown() {
  if (runB() && view.compare === "difference") return "difference";
  return view.show === "cosine" && view.pin >= 0 && !view.all ? "cosine" : view.scale;
}

function drawLegend(bar, ticks, unit, keys) {
  const scale = scaleShown(), {label, ticks: labels} = SCALES[scale], wanted = `${scale} ${view.table} ${view.show} ${view.all}`;
  if (bar.dataset.drawn !== wanted) {
    bar.dataset.drawn = wanted;
    drawBar(bar, scale, view.table);
    ticks.replaceChildren(...labels.map(text => el("span", {}, text)));
    unit.textContent = view.show === "colors" && !view.all ? `${label} (heads)` : label;
  }
  const truths = view.truth && runA().truths[view.image].length > 0;
  const told = [view.mask && scale !== "difference" ? ["key-mask", `top ${percent(view.threshold)} of attention`] : null,
    truths ? ["key-truth", "ground truth"] : null].filter(Boolean);
  const text = told.map(([, words]) => words).join();
  if (keys.dataset.text !== text) {
    keys.dataset.text = text;
    keys.replaceChildren(...told.map(([name, words]) => el("span", {class: "key"}, el("i", {class: name, "aria-hidden": "true"}), words)));
  }
}
