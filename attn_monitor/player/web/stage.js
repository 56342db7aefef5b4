// The maps: a column for each role (and run) with one large map and its heads, or a gallery of all images.
import { drawColourBar, SCALES } from "./colours.js";
import { partsOf, shownColumns } from "./columns.js";
import { changeDetector, el } from "./elements.js";
import { LargeTile } from "./large_tile.js";
import { entropyOf, grouped, percent, range } from "./numbers.js";
import { makeReadout } from "./readout.js";
import { runDot, Tile } from "./tile.js";
import {
  change,
  pictureCount,
  roleClass,
  runA,
  runB,
  shownIndex,
  shownLayer,
  shownPicture,
  shownStep,
  state,
  view,
} from "./view.js";

/** @import {Column, Layer} from "./types" */
/** @typedef {{draw: (columns: Column[], order: number[]) => void, tiles: Tile[]}} Part of the stage */

/** The scale of the large maps. */
export function shownScale() {
  if (runB() && view.compare === "difference") return "difference";
  return view.show === "cosine" && view.pin >= 0 && !view.all ? "cosine" : view.scale;
}

export function makeStage() {
  const legend = makeLegend();
  const pictures = el("div", { class: "pictures" });
  const readout = makeReadout();
  const children = [legend.element, pictures, readout.element];
  const element = el("section", { class: "stage", "aria-label": "attention maps" }, ...children);
  /** @type {Part[]} */
  let parts = [];
  const layoutChanged = changeDetector();

  /**
   * @param {Column[]} columns
   * @param {number} heads
   */
  function build(columns, heads) {
    const sections = view.all ? galleryItems(columns) : columns.map((column, i) => columnOf(column, i, heads));
    pictures.className = `pictures ${view.all ? "gallery" : view.arrange} columns${columns.length}`;
    const [height, width] = runA().facts.size;
    pictures.style.setProperty("--width-by-height", String(width / height));
    pictures.replaceChildren(...sections.map((section) => section.element));
    parts = sections.flatMap((section) => section.parts);
  }

  function draw() {
    const columns = shownColumns();
    const heads = Math.max(0, ...columns.map(headsOf));
    const titles = columns.map(({ title }) => title).join("\n");
    if (layoutChanged(titles, heads, view.all, view.arrange, runA().images, runB())) build(columns, heads);
    for (const { tiles } of parts) for (const tile of tiles) tile.measure();
    const order = view.sort === "entropy" && !view.all ? byEntropy(columns, heads) : range(heads);
    for (const part of parts) part.draw(columns, order);
    legend.draw();
    readout.draw(
      columns,
      parts.flatMap(({ tiles }) => tiles),
    );
  }
  return { element, pictures, draw };
}

/** @param {Column} column */
const headsOf = (column) => Math.max(...partsOf(column).map(({ layer }) => layer?.heads ?? 0));

/**
 * Heads from the lowest to the highest entropy, summed over the columns: one order for all, as heads correspond.
 * @param {Column[]} columns
 * @param {number} heads
 */
function byEntropy(columns, heads) {
  const blocks = columns.map((column) => partsOf(column)[0].block);
  const totals = range(heads).map((head) => {
    const maps = blocks.flatMap((block) => (block && head < block.heads ? [block.map(view.image, head)] : []));
    const total = maps.reduce((sum, map) => sum + entropyOf(map), 0);
    return Number.isNaN(total) ? Infinity : total;
  });
  return range(heads).sort((a, b) => (totals[a] === totals[b] ? a - b : totals[a] - totals[b]));
}

/**
 * @param {Column} column
 * @param {number} index
 * @param {number} heads
 */
function columnOf(column, index, heads) {
  const dot = column.side === undefined ? el("span", { class: `dot ${roleClass(column.role)}` }) : runDot(column.side);
  const detail = el("span", { class: `detail ${runB() ? "of-two" : ""}` });
  const header = el("header", {}, dot, el("h2", {}, column.title), detail);
  const element = el("section", { class: "column", "aria-label": column.title }, header);
  /** @type {Part[]} */
  const parts = [{ tiles: [], draw: (columns) => (detail.textContent = detailOf(columns[index])) }];
  if (view.arrange !== "grid") {
    const tile = new LargeTile();
    element.append(tile.element);
    parts.push({ tiles: [tile], draw: (columns) => tile.draw(columns[index], view.image, view.head) });
  }
  if (view.arrange !== "single" && heads) {
    const list = headList(index, heads);
    element.append(list.element);
    parts.push(list);
  }
  return { element, parts };
}

/** @param {Column} column */
function detailOf({ runs, role, side }) {
  const differ = new Set(state.runs.map((run) => shownLayer(run))).size > 1;
  const details = runs.map((run) => {
    const { step: at } = run.steps[shownIndex(run)];
    const ended = at < shownStep() && at === run.steps[run.steps.length - 1].step;
    const step = `step ${grouped(at)}${ended ? ", its last" : ""}`;
    return differ ? `${step}, layer ${shownLayer(run)}` : step;
  });
  if (runs.length > 1) return `A ${details[0]} · B ${details[1]}`;
  if (side !== undefined) return details[0];
  const layer = runs[0].layer(shownIndex(runs[0]), role, shownLayer());
  return layer ? [layer.model, axesOf(layer)].filter(Boolean).join(" · ") : "";
}

/** @type {Record<string, string>} */
const AXES = { f: "frequency", t: "time", c: "channels", d: "slices" };

/**
 * What lies along the axes of a map, where it is no picture's rows and columns.
 * @param {Layer} layer
 */
function axesOf({ axes: [down, right] }) {
  if (down === "h" && right === "w") return "";
  return [down && `${AXES[down] ?? down} ↓`, `${AXES[right] ?? right} →`].filter(Boolean).join(", ");
}

/** @param {number} heads */
function headsPerRow(heads) {
  if (view.arrange === "grid") return Math.max(2, Math.min(8, Math.ceil(Math.sqrt(heads))));
  if (heads <= 4) return 4;
  return heads % 6 && heads % 4 === 0 && heads <= 16 ? heads / 2 : 6;
}

/**
 * @param {number} index of the column
 * @param {number} heads
 */
function headList(index, heads) {
  const tiles = range(heads).map((head) => Tile.button(() => change({ head: view.head === head ? -1 : head })));
  const elements = tiles.map((tile) => tile.element);
  const element = el("div", { class: "heads", role: "group", "aria-label": "heads" }, ...elements);
  element.style.setProperty("--across", String(headsPerRow(heads)));
  const orderChanged = changeDetector();
  /** @type {Part["draw"]} */
  const draw = (columns, order) => {
    if (orderChanged(...order)) element.append(...order.map((head) => elements[head]));
    tiles.forEach((tile, head) => {
      tile.element.ariaPressed = String(view.head === head);
      tile.draw(columns[index], view.image, head);
    });
  };
  return { element, tiles, draw };
}

/** @param {Column[]} columns */
function galleryItems(columns) {
  const firsts = range(runA().images.length / pictureCount()).map((image) => image * pictureCount());
  return firsts.map((first) => {
    const name = runA().images[first].name.split(", mean of ")[0];
    const tiles = columns.map(() => Tile.button(() => change({ all: false, image: first + shownPicture() })));
    const cells = columns.map(({ title }, i) => el("div", {}, el("span", { class: "small" }, title), tiles[i].element));
    const pair = el("div", { class: "pair" }, ...cells);
    const element = el("section", { class: "item", "aria-label": name }, el("h2", {}, name), pair);
    /** @type {Part["draw"]} */
    const draw = (columns) => tiles.forEach((tile, i) => tile.draw(columns[i], first + shownPicture(), view.head));
    return { element, parts: [{ tiles, draw }] };
  });
}

function makeLegend() {
  const bar = el("canvas", { class: "bar", "aria-hidden": "true" });
  const ticks = el("div", { class: "ticks" });
  const unit = el("span", { class: "unit" });
  const mask = el("span", {});
  const maskKey = el("span", { class: "key" }, el("i", { class: "key-mask" }), mask);
  const truthKey = el("span", { class: "key" }, el("i", { class: "key-truth" }), "ground truth");
  const element = el(
    "div",
    { class: "legend", role: "group", "aria-label": "legend" },
    el("div", { class: "scale" }, bar, ticks),
    unit,
    el("span", { class: "keys" }, maskKey, truthKey),
  );
  const scaleChanged = changeDetector();
  function draw() {
    const scale = shownScale();
    if (scaleChanged(scale, view.table)) {
      drawColourBar(bar, scale, view.table);
      ticks.replaceChildren(...SCALES[scale].ticks.map((tick) => el("span", {}, tick)));
    }
    unit.textContent = SCALES[scale].unit + (view.show === "colors" && !view.all ? " (heads)" : "");
    mask.textContent = `top ${percent(view.threshold)} of attention`;
    maskKey.hidden = !view.mask || scale === "difference" || scale === "cosine";
    truthKey.hidden = !view.truth || !runA().truths[view.image].length;
  }
  return { element, draw };
}
