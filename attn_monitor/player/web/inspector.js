// The selected patch in every head and over steps, the prefix tokens, and facts of the layer.
import { partsOf, shownColumns } from "./columns.js";
import { changeDetector, el } from "./elements.js";
import { LineChart, rangeOf } from "./line_chart.js";
import { cosines, formatted, grouped, percent, range } from "./numbers.js";
import { clamp, matchingPatch, placeOf } from "./patch_grid.js";
import { hasQueries } from "./tile.js";
import { shownDomain } from "./timeline.js";
import { headName, pinnedPatch, roleClass, selectedPatch, shownQuery, shownStep, view } from "./view.js";

/** @import {Column, Curve, Layer, PatchGrid, PatchRef} from "./types" */
/** @import {Part} from "./columns.js" */
/** @import {Run} from "./run.js" */

/** @type {Record<string, string | undefined>} how the patch of each token was found */
const PLACES = {
  exact: "exact: each token follows its own patch of the image alone",
  "exact but masked": "exact, with some patches masked in the model",
  centres: "centres: each token follows most the image at its patch's centre",
};

const NO_QUERIES =
  "What this patch itself attends to is not kept in archives: attn-monitor show MODEL IMAGES --player shows it, " +
  "and attention_player(model, images) in a notebook.";

const HISTORY = 60; // snapshots that are fetched for it, evenly spaced

/** @typedef {Required<Part> & {title: string, className: string}} InspectedPart */

export function makeInspector() {
  const parts = [makePatchCard(), makePrefixCard(), makeFacts()];
  const element = el("div", { class: "inspector" }, ...parts.map((part) => part.element));
  function draw() {
    const shown = shownColumns().flatMap(inspectedParts);
    const patch = selectedPatch();
    for (const part of parts) part.draw(shown, patch);
  }
  return { element, draw };
}

/**
 * @param {Column} column
 * @returns {InspectedPart[]} without runs where the block is not loaded
 */
function inspectedParts(column) {
  return partsOf(column).flatMap(({ run, layer, block }, i) => {
    if (!layer || !block) return [];
    const title = column.runs.length > 1 ? `${column.role} ${"AB"[i]}` : column.title;
    return [{ run, layer, block, title, className: roleClass(column.role) + ((column.side ?? i) ? " other" : "") }];
  });
}

function makePatchCard() {
  const title = el("h3", {});
  const hint = el("p", { class: "hint" }, "Hover over a map, or tap it, to read a patch; click to pin it.");
  const key = el("p", { class: "hint reading" });
  const bars = new Bars("bars");
  const cosine = el("p", { class: "hint" });
  const history = makeHistory();
  const refusal = el("p", { class: "hint" }, NO_QUERIES);
  const values = el("div", { class: "values" }, key, bars.element, cosine, history.element, refusal);
  const element = el("section", { class: "card patch", "aria-label": "patch" }, title, hint, values);

  /** @type {(parts: InspectedPart[], patch: PatchRef | null) => void} */
  function draw(parts, patch) {
    const found = patch && parts.length ? matchingPatch(parts[0].layer.patchGrid, patch) : -1;
    hint.hidden = found >= 0;
    values.hidden = found < 0;
    title.textContent = "Patch";
    if (!patch || found < 0) return;
    const { layer } = parts[0];
    const columns = layer.grid[1];
    const [first, second] = layer.axes.map((axis) => (["h", "w", ""].includes(axis) ? "" : `${axis} `));
    title.textContent = `Patch ${first}${Math.floor(found / columns)}, ${second}${found % columns}`;
    const query = shownQuery(layer, patch.image);
    refusal.hidden = view.pin < 0 || hasQueries();
    key.replaceChildren(
      query < 0 ? "× uniform" : `× uniform, of patch ${placeOf({ patch: layer.queries[query], ...layer }).join(", ")}`,
      ...parts.map((part) => el("span", { class: `value ${part.className}` }, part.title)),
    );
    bars.draw(weightRows(parts, patch));
    cosine.textContent = cosineText(parts, patch);
    cosine.hidden = !cosine.textContent;
    history.draw(parts, patch);
  }
  return { element, draw };
}

/**
 * A row for each head and part, on one scale.
 * @param {InspectedPart[]} parts
 * @param {PatchRef} patch
 * @returns {Row[]}
 */
function weightRows(parts, patch) {
  const rows = range(parts[0].layer.heads + 1).flatMap((i) =>
    parts.map(({ layer, block, title, className }, p) => {
      const found = matchingPatch(layer.patchGrid, patch);
      const weight = block.patchWeight(patch.image, i - 1, found, shownQuery(layer, patch.image));
      const chosen = i - 1 === view.head ? " chosen" : "";
      return {
        label: p ? "" : i ? headName(i - 1) : "mean",
        title: `${title}, ${headName(i - 1)}`,
        share: weight,
        text: Number.isFinite(weight) ? `${formatted(weight)}×` : "–",
        className: className + chosen + (p ? "" : " first"),
      };
    }),
  );
  const highest = Math.max(4, ...rows.map(({ share }) => share).filter(Number.isFinite));
  return rows.map((row) => ({ ...row, share: row.share / highest }));
}

/**
 * Cosine of a patch to the pinned one, where features are stored.
 * @param {InspectedPart[]} parts
 * @param {PatchRef} patch
 */
function cosineText(parts, patch) {
  if (view.pin < 0 || patch.image !== view.image) return "";
  const texts = parts.flatMap(({ layer: { patchGrid }, block, title }) => {
    if (!block.width) return [];
    const all = cosines(block.features(patch.image), block.width, matchingPatch(patchGrid, pinnedPatch()));
    return [`${title} ${formatted(all[matchingPatch(patchGrid, patch)])}`];
  });
  return texts.length ? `cosine to the pinned patch: ${texts.join(", ")}` : "";
}

function makeHistory() {
  const chart = new LineChart("history", "weight of the patch over steps");
  const caption = el("p", { class: "hint" });
  const element = el("div", {}, chart.element, caption);
  const patchChanged = changeDetector();
  /** @type {Curve[]} */
  let curves = [];

  /** @type {(parts: InspectedPart[], patch: PatchRef) => void} */
  function draw(parts, patch) {
    const sources = parts.flatMap(({ run, title, layer }) => [run, run.steps, run.cache.size, title, layer.layer]);
    if (patchChanged(patch.image, patch.patch, patch.patchGrid, view.head, view.show, view.pin, ...sources)) {
      curves = parts.map((part) => historyOf(part, patch));
    }
    const [first, last] = shownDomain();
    element.hidden = first === last;
    chart.draw(curves, [first, last], shownStep(), (value) => `${formatted(value)}×`, rangeOf("weight"));
    caption.textContent = `${headName(view.head)} over steps ${grouped(first)} to ${grouped(last)}`;
  }
  return { element, draw };
}

/**
 * @param {InspectedPart} part
 * @param {PatchRef} patch
 * @returns {Curve}
 */
function historyOf({ run, layer: { role, layer }, className }, patch) {
  /** @type {[number, number][]} */
  const points = run.steps.map(({ step }, index) => {
    const found = run.layer(index, role, layer);
    const match = found ? matchingPatch(found.patchGrid, patch) : -1;
    const block = run.cached(index, layer)?.[role];
    const query = found ? shownQuery(found, patch.image) : -1;
    return [step, block ? block.patchWeight(patch.image, view.head, match, query) : NaN];
  });
  return { className: `${className} mean`, dotted: true, points: points.filter((point) => Number.isFinite(point[1])) };
}

/**
 * The snapshots that a history needs.
 * @param {Run} run
 */
export function historyIndices(run) {
  const count = run.steps.length;
  const every = Math.ceil(count / HISTORY);
  return range(count).filter((index) => index % every === 0 || index === count - 1);
}

function makePrefixCard() {
  const title = el("h3", {});
  const bars = new Bars("tokens");
  const element = el("section", { class: "card", "aria-label": "prefix tokens" }, title, bars.element);

  /** @type {(parts: InspectedPart[]) => void} */
  function draw(parts) {
    const shown = parts.filter(({ layer }) => layer.prefix.length > 0);
    element.hidden = shown.length === 0;
    title.textContent = `Prefix tokens, ${headName(view.head)}`;
    const rows = shown.flatMap(({ layer, block, title, className }) =>
      layer.prefix.map((name, token) => {
        const share = block.weight(view.image, view.head, token, shownQuery(layer, view.image));
        return { label: `${title} ${name}`, title: "", share, text: percent(share), className };
      }),
    );
    bars.draw(rows);
  }
  return { element, draw };
}

/** @typedef {{label: string, title: string, share: number, text: string, className: string}} Row share in 0…1 */

/** Rows of a label, a bar and a number. */
class Bars {
  /** @param {string} className */
  constructor(className) {
    this.element = el("div", { class: className });
  }

  /** @param {Row[]} rows */
  draw(rows) {
    const { element } = this;
    if (element.children.length !== rows.length) element.replaceChildren(...rows.map(makeRow));
    rows.forEach(({ label, title, share, text, className }, i) => {
      const row = /** @type {HTMLElement} */ (element.children[i]);
      const [name, bar, number] = /** @type {HTMLElement[]} */ ([...row.children]);
      row.className = `row ${className}`;
      row.title = title;
      name.textContent = label;
      bar.style.setProperty("--share", `${100 * clamp(share || 0, 0, 1)}%`);
      number.textContent = text;
    });
  }
}

function makeRow() {
  const parts = ["label", "bar", "number"].map((name) => el("span", { class: name }));
  return el("div", { class: "row" }, ...parts);
}

function makeFacts() {
  const list = el("dl", { class: "facts" });
  const element = el("details", { class: "card about" }, el("summary", {}, "About this layer"), list);
  const partsChanged = changeDetector();

  /** @type {(parts: InspectedPart[]) => void} */
  function draw(parts) {
    if (!partsChanged(...parts.flatMap(({ title, layer }) => [title, layer]))) return;
    const facts = parts.flatMap(({ title, layer }) => factsOf(title, layer));
    list.replaceChildren(...facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
  }
  return { element, draw };
}

/**
 * @param {string} title
 * @param {Layer} layer
 * @returns {[string, string][]}
 */
function factsOf(title, layer) {
  const values = layer.kind === "distribution" ? "distributions" : layer.kind;
  return [
    [title, `${layer.model || "model"}, ${layer.name}`],
    ["rows", values + (layer.mixed ? ", mixed" : "")],
    ["query", layer.query || "unknown"],
    ["patch positions", PLACES[layer.places] ?? (layer.places || "unknown")],
    ["patches", layer.grid.join(" × ") + (layer.geometry ? geometryText(layer.patchGrid) : "")],
  ];
}

/** @param {PatchGrid} patchGrid */
function geometryText({ origin, cell }) {
  return ` of ${cell.map(formatted).join(" × ")} pixels, the first at ${origin.map(formatted).join(", ")}`;
}
