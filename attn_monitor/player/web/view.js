// What is shown. Changing it requests a new drawing of the page, and a link restores it.
import { changeDetector } from "./elements.js";
import { drawing, manifest } from "./manifest.js";
import { clamp, matchingPatch } from "./patch_grid.js";

/** @import {Layer, PatchRef, View} from "./types" */
/** @import {Run} from "./run.js" */

/** @type {View} */
const DEFAULTS = {
  step: null,
  image: 0,
  all: false,
  layer: null,
  head: -1,
  arrange: "focus",
  sort: "index",
  show: "attention",
  opacity: 1,
  scale: drawing.scale,
  table: drawing.table,
  mask: true,
  truth: true,
  threshold: drawing.threshold,
  compare: "side",
  swipe: 0.5,
  metric: "entropy",
  speed: 8,
  pin: -1,
  theme: "auto",
  run: null,
  other: null,
  list: Boolean(manifest.list),
  by: "",
  at: manifest.list?.at ?? "last",
  columns: "",
};

/** @type {Record<string, string[]>} */
const CHOICES = {
  arrange: ["focus", "grid", "single"],
  sort: ["index", "entropy"],
  show: ["attention", "patch", "colors", "cosine"],
  scale: Object.keys(drawing.scales),
  table: Object.keys(drawing.tables),
  compare: ["side", "swipe", "difference"],
  theme: ["auto", "light", "dark"],
  at: ["last", "pick"],
};

/** What a link restores. */
export const view = { ...DEFAULTS };

/** What a link does not restore; `index` is that of the shown step among those of `shownSteps`. */
export const state = {
  /** @type {PatchRef | null} */
  hover: null,
  playing: false,
  /** @type {Run[]} */
  runs: [],
  index: 0,
};

/** @type {(() => void)[]} */
const drawFunctions = [];
let requested = false;

/** @param {(() => void)[]} draws called, in this order, in the next frame after a change */
export function onDraw(...draws) {
  drawFunctions.push(...draws);
}

export function requestDraw() {
  if (requested) return;
  requested = true;
  requestAnimationFrame(() => {
    requested = false;
    for (const draw of drawFunctions) draw();
  });
}

/** @param {Partial<View>} changes */
export function change(changes) {
  Object.assign(view, changes);
  requestDraw();
}

/** @param {PatchRef | null} patch */
export function hover(patch) {
  const { hover: last } = state;
  const same = patch?.image === last?.image && patch?.patch === last?.patch && patch?.patchGrid === last?.patchGrid;
  if (same && patch?.tile === last?.tile) return;
  state.hover = patch;
  requestDraw();
}

export function unpin() {
  hover(null);
  change({ pin: -1, show: ["cosine", "patch"].includes(view.show) ? "attention" : view.show });
}

export const runA = () => state.runs[0];

/** How many pictures each image has: of clips and volumes the mean, the maximum, and every frame or slice. */
export const pictureCount = () => Math.max(1, runA().facts.pictures.length);

/** Which of them is shown. */
export const shownPicture = () => view.image % pictureCount();

/**
 * Show the same picture of another image.
 * @param {number} image counted without pictures
 */
export function showImage(image) {
  const last = runA().images.length / pictureCount() - 1;
  change({ image: clamp(image, 0, last) * pictureCount() + shownPicture() });
}

/**
 * Show another picture of the same image.
 * @param {number} picture
 */
export function showPicture(picture) {
  change({ image: view.image - shownPicture() + clamp(picture, 0, pictureCount() - 1) });
}

/** The image that is shown, counted without pictures. */
export const shownImage = () => Math.floor(view.image / pictureCount());

/** @returns {Run | undefined} */
export const runB = () => state.runs[1];

/** The patch below the pointer, or else the pinned one. */
export const selectedPatch = () => state.hover ?? (view.pin >= 0 ? pinnedPatch() : null);

/** @returns {PatchRef} the index of a pinned patch is that in the grid of the first role */
export const pinnedPatch = () => ({ image: view.image, patch: view.pin, patchGrid: firstLayer().patchGrid });

/**
 * Which of a layer's queries is shown instead of the recorded one: the nearest to the pinned patch; -1 for none.
 * @param {Layer} layer
 * @param {number} image
 */
export function shownQuery({ patchGrid, queries }, image) {
  if (view.show !== "patch" || view.pin < 0 || image !== view.image || !queries.length) return -1;
  const pinned = matchingPatch(patchGrid, pinnedPatch());
  const columns = patchGrid.shape[1];
  const distances = queries.map((patch) => {
    return Math.hypot(
      Math.floor(patch / columns) - Math.floor(pinned / columns),
      (patch % columns) - (pinned % columns),
    );
  });
  return pinned < 0 ? -1 : distances.indexOf(Math.min(...distances));
}

/** The shown layer of the first run, in all roles that have it. */
export function shownLayers() {
  const [layers, layer] = [runA().layout(shownIndex(runA())), shownLayer()];
  return layers.filter((found) => found.layer === layer);
}

export const firstLayer = () => shownLayers()[0];

const runsChanged = changeDetector();
/** @type {number[]} */
let steps = [];

/** Steps at which any of the runs has a snapshot, in order: what the slider goes through. */
export function shownSteps() {
  if (runsChanged(...state.runs.map((run) => run.steps))) {
    const all = state.runs.flatMap((run) => run.steps.map(({ step }) => step));
    steps = [...new Set(all)].sort((a, b) => a - b);
  }
  return steps;
}

/** The shown step. */
export const shownStep = () => shownSteps()[state.index];

/**
 * The index of the step nearest to another one, the earlier of two.
 * @param {number[]} steps
 * @param {number} step
 */
function nearest(steps, step) {
  const distances = steps.map((other) => Math.abs(other - step));
  return distances.indexOf(Math.min(...distances));
}

/**
 * The index of a run's snapshot that is shown: the nearest to the shown step, or to another one.
 * @param {Run} run
 * @param {number} step
 */
export const shownIndex = (run, step = shownStep()) =>
  nearest(
    run.steps.map((other) => other.step),
    step,
  );

/** @param {number} index among those of `shownSteps` */
export function showSnapshot(index) {
  const last = shownSteps().length - 1;
  state.index = clamp(index, 0, last);
  change({
    step: state.index === last ? null : shownStep(),
    image: Math.min(view.image, runA().images.length - 1),
  });
}

/** @param {number | null} step null for the last one */
export const showStep = (step) => showSnapshot(step === null ? Infinity : nearest(shownSteps(), step));

/**
 * @param {Run} run
 * @param {number} index
 */
export function layersOf(run, index = shownIndex(run)) {
  return [...new Set(run.layout(index).map(({ layer }) => layer))].sort((a, b) => a - b);
}

/**
 * The selected layer (of a second run, the first run's), or the last one where it was not recorded.
 * @param {Run} run
 * @param {number} index
 * @returns {number}
 */
export function shownLayer(run = runA(), index = shownIndex(run)) {
  const layers = layersOf(run, index);
  const wanted = run === runA() ? view.layer : shownLayer();
  return wanted !== null && layers.includes(wanted) ? wanted : layers[layers.length - 1];
}

/** @param {Run} run */
export const rolesOf = (run) => [...new Set(run.layout(shownIndex(run)).map(({ role }) => role))];

/**
 * The class that colours a role: student and teacher have their own, other roles take turns.
 * @param {string} role
 */
export function roleClass(role) {
  const named = ["student", "teacher"];
  if (named.includes(role)) return `role-${role}`;
  const roles = new Set(runA().facts.layouts.flatMap((layout) => layout.map((layer) => layer.role)));
  return `role-${[...roles].filter((other) => !named.includes(other)).indexOf(role) % 3}`;
}

/** @param {number} head */
export const headName = (head) => (head < 0 ? "mean of heads" : `head ${head}`);

/** The part of a link after "#": what differs from the defaults. */
export function toHash() {
  const entries = Object.entries(view).filter(([key, value]) => value !== /** @type {any} */ (DEFAULTS)[key]);
  return new URLSearchParams(entries.map(([key, value]) => [key, String(value)])).toString();
}

/**
 * Restore the view of a link, without values that are not valid.
 * @param {string} hash
 */
export function fromHash(hash) {
  /** @type {any} */
  const restored = { ...DEFAULTS };
  for (const [key, text] of new URLSearchParams(hash.replace(/^#/, ""))) {
    if (!Object.hasOwn(DEFAULTS, key)) continue;
    const type = key === "step" || key === "layer" ? "number" : typeof restored[key];
    if (type === "boolean") restored[key] = text === "true";
    else if (type === "number") restored[key] = text !== "" && isFinite(+text) ? +text : restored[key];
    else if (!CHOICES[key] || CHOICES[key].includes(text)) restored[key] = text;
  }
  const lastImage = runA() ? runA().images.length - 1 : Infinity;
  Object.assign(view, restored, {
    opacity: clamp(restored.opacity, 0, 1),
    threshold: clamp(restored.threshold, 0.05, 1),
    swipe: clamp(restored.swipe, 0, 1),
    speed: clamp(restored.speed, 1, 30),
    head: Math.max(-1, Math.trunc(restored.head)),
    image: clamp(Math.trunc(restored.image), 0, lastImage),
    pin: Math.trunc(restored.pin),
  });
}
