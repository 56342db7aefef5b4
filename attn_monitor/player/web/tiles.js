// A tile: one map on a canvas, with its caption, that tells which patch the pointer is on.
import {RUN_COLOURS} from "./colours.js";
import {cosines, entropyOf, isFinite32, massMask, meanOf, peakOf, percent, shareOf} from "./numbers.js";
import {fitCanvas, lineOf, outlined, paintMap} from "./painting.js";
import {overlaps, patchAt, patchIn} from "./places.js";
import {atOf, change, chosenPatch, firstPlace, hover, now, pinned, runA, shownLayer, view} from "./view.js";

// An element with attributes and children; text is text, never HTML.
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter(child => child !== null && child !== undefined));
  return element;
}

export const headName = head => head < 0 ? "mean of heads" : `head ${head}`;

// What a column shows: a role of one run, or of two runs together.
function partsOf(column) {
  return column.runs.map(run => {
    const at = atOf(run), layer = shownLayer(run);
    return {run, at, layer, entry: run.entry(at, column.role, layer), part: run.peek(at, layer)?.[column.role]};
  });
}

// `large` tiles can be walked through patch by patch; the others are buttons that choose a head or an image.
export function makeTile({large, onpick}) {
  const canvas = el("canvas", large ? {tabindex: 0, role: "img"} : {"aria-hidden": "true"});
  const caption = el(large ? "figcaption" : "span", {class: "caption"});
  const element = large ? el("figure", {class: "tile large"}, canvas, caption)
    : el("button", {class: "tile", type: "button", onclick: onpick}, canvas, caption);
  const tile = {element, canvas, caption, place: null, image: 0, width: 0};
  canvas.addEventListener("pointermove", event => {
    if (large && view.compare === "swipe" && event.buttons && now.runs[1]) change({swipe: fractionOf(event, canvas)});
    hover(placeOf(event, tile));
  });
  canvas.addEventListener("pointerleave", () => hover(null));
  if (large) {
    let pressed = 0;
    canvas.addEventListener("pointerdown", event => pressed = event.clientX);
    canvas.addEventListener("click", event => {
      if (Math.abs(event.clientX - pressed) < 5) pin(placeOf(event, tile)); // else it was a swipe
    });
    canvas.addEventListener("keydown", event => walk(event, tile));
    canvas.addEventListener("blur", () => hover(null));
  }
  return tile;
}

function fractionOf(event, canvas) {
  const box = canvas.getBoundingClientRect();
  return Math.max(0, Math.min(1, (event.clientX - box.left) / box.width));
}

// The patch below the pointer; null where there is none.
function placeOf(event, {canvas, place, image}) {
  if (!place) return null;
  const box = canvas.getBoundingClientRect();
  const within = (position, pixels) => Math.max(0, Math.min(pixels - 1e-3, position * pixels));
  const y = within((event.clientY - box.top) / box.height, place.size[0]);
  const patch = patchAt(place, [y, within((event.clientX - box.left) / box.width, place.size[1])]);
  return patch < 0 ? null : {image, patch, place};
}

// Choose a patch, or let go of the one that was chosen. Where features are stored, its cosine to all is shown.
function pin(place) {
  if (!place) return;
  const patch = patchIn(firstPlace(), place), same = view.pin === patch && view.image === place.image;
  const show = same ? (view.show === "cosine" ? "attention" : view.show) : hasFeatures() ? "cosine" : view.show;
  change({pin: same ? -1 : patch, image: place.image, show});
}

export function hasFeatures() {
  const run = runA();
  return run.layout(now.at).some(entry => entry.layer === shownLayer() && entry.features > 0);
}

export function hasColours() {
  return runA().layout(now.at).some(entry => entry.layer === shownLayer() && entry.colors);
}

const STEPS = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};

// With the keyboard: arrows move the cursor from patch to patch, Enter chooses, Escape leaves.
function walk(event, {place, image}) {
  if (!place || event.ctrlKey || event.metaKey || event.altKey) return;
  const step = STEPS[event.key], [gh, gw] = place.grid;
  if (step) {
    const from = now.hover?.image === image ? patchIn(place, now.hover) : view.pin >= 0 ? patchIn(place, pinned()) : gw * (gh >> 1) + (gw >> 1);
    const y = Math.max(0, Math.min(gh - 1, Math.floor(from / gw) + step[0]));
    const x = Math.max(0, Math.min(gw - 1, from % gw + step[1]));
    hover({image, patch: y * gw + x, place});
  } else if (event.key === "Enter" || event.key === " ") {
    pin(now.hover);
  } else if (event.key === "Escape") {
    hover(null);
    change({pin: -1, show: view.show === "cosine" ? "attention" : view.show});
  } else {
    return;
  }
  event.preventDefault();
  event.stopPropagation();
}

// Older archives do not know where patches are.
const atOnePlace = (a, b) => !a.geometry || !b.geometry || JSON.stringify(a.place) === JSON.stringify(b.place);

// Draw a column's map of an image and a head (-1: their mean) and say what it shows.
export function drawTile(tile, column, image, head, {large = false} = {}) {
  const parts = partsOf(column), [first, second] = parts;
  tile.image = image;
  tile.place = first.entry?.place ?? null;
  const missing = parts.find(({entry}) => !entry || head >= entry.heads);
  const waits = !missing && parts.some(({part}) => !part); // what is drawn is of another step as yet
  tile.element.classList.toggle("absent", Boolean(missing?.entry));
  tile.element.classList.toggle("stale", waits);
  if (missing) {
    const reason = missing.entry ? `there is no ${headName(head)}` : "not recorded at this step";
    tile.caption.textContent = large || !missing.entry ? reason : "";
    (large ? tile.canvas : tile.element).setAttribute("aria-label", `${column.title}, ${headName(head)}: ${reason}`);
    tile.canvas.getContext("2d").clearRect(0, 0, tile.canvas.width, tile.canvas.height);
    return;
  }
  if (waits) return;
  fitCanvas(tile.canvas, tile.place, tile.width || 64);
  const maps = parts.map(({run, at, layer}) => run.map(at, column.role, layer, image, head));
  const chosen = chosenPatch(), alike = second && maps[0].length === maps[1].length && atOnePlace(first.entry, second.entry);
  const common = {
    photo: first.run.pictures[image], place: tile.place, opacity: view.opacity, table: view.table,
    truths: view.truth ? first.run.truths[image] : [],
    cursor: now.hover?.image === image ? patchIn(tile.place, now.hover) : -1,
    pin: large && view.image === image ? patchIn(tile.place, pinned()) : -1,
  };
  const contentOf = index => contentFor(parts[index], maps[index], image, large);
  const maskOf = values => view.mask && !(large && view.show !== "attention") ? outlined(values, view.threshold) : null;
  if (second && view.compare === "difference") {
    paintMap(tile.canvas, {...common, content: alike ? {a: maps[0], b: maps[1]} : null});
  } else {
    paintMap(tile.canvas, {...common, content: contentOf(0), mask: maskOf(maps[0])});
    if (second) {
      paintMap(tile.canvas, {...common, content: contentOf(1), mask: maskOf(maps[1]), place: second.entry.place, clip: view.swipe});
      strokeDivider(tile.canvas);
    }
  }
  const numbers = second ? comparisonOf(maps, alike, large) : numbersOf(first, maps[0], image, head, large);
  caption(tile, [["", head < 0 ? "mean" : large ? `head ${head}` : String(head), ""], ...numbers]);
  const words = numbers.map(([before, value, after]) => before + value + after).join(", ");
  const said = `${column.title}, ${first.run.images[image].name}, ${headName(head)}: ${words}`;
  (large ? tile.canvas : tile.element).setAttribute("aria-label", large && chosen ? `${said}, patch ${chosen.patch}` : said);
}

const fixed = (value, digits) => Number.isFinite(value) ? value.toFixed(digits) : "–";

// A name and numbers, each as words before it, the number, words after it and a title; elements are made once.
function caption({caption: element}, parts) {
  if (element.children.length !== parts.length || !element.firstChild?.matches?.("b")) {
    element.replaceChildren(el("b"), ...parts.slice(1).map(() => el("span", {class: "stat"}, "", el("i"), "")));
  }
  parts.forEach(([before, value, after, title = ""], i) => {
    const child = element.children[i];
    if (i === 0) {
      child.textContent = value;
      return;
    }
    child.title = title;
    child.firstChild.data = before;
    child.children[0].textContent = value;
    child.lastChild.data = after;
  });
}

function contentFor({part, entry}, values, image, large) {
  if (large && view.show === "colors" && part.colours(image)) return {colours: part.colours(image)};
  const chosen = patchIn(entry.place, pinned());
  if (large && view.show === "cosine" && part.width && chosen >= 0) {
    return {values: cosines(part.features(image), part.width, chosen), scale: "cosine"};
  }
  return {values, scale: view.scale};
}

function strokeDivider(canvas) {
  const context = canvas.getContext("2d"), x = Math.round(view.swipe * canvas.width), line = lineOf(canvas.width);
  context.fillStyle = "#000";
  context.fillRect(x - 2 * line, 0, 4 * line, canvas.height);
  context.fillStyle = "#fff";
  context.fillRect(x - line, 0, 2 * line, canvas.height);
}

// Entropy, area of the mask, peak, overlap with ground truth: of a large tile all of them.
function numbersOf({run, entry}, values, image, head, large) {
  if (!isFinite32(values)) return [["missing: ", "NaN", ""]];
  const stats = [], add = (label, value, title) => stats.push([`${label} `, value, "", title]);
  const mask = massMask(values, view.threshold), signed = values.some(value => value < 0);
  const objects = signed ? [] : run.truths[image]; // there is no mask of weights of which some are negative
  add("H", fixed(entropyOf(values), 2), "entropy over patches: 1 uniform, 0 one patch");
  if (!large) {
    if (objects.length && view.truth) add("IoU", meanOf(overlaps(mask, entry.place, objects)).toFixed(2), "overlap with ground truth");
    return stats;
  }
  add("mask", percent(signed ? NaN : shareOf(mask)), "area of the mask");
  add("peak", signed ? "–" : `${fixed(peakOf(values), 1)}×`, "largest weight, in units of uniform attention");
  if (objects.length) {
    add("IoU", meanOf(overlaps(mask, entry.place, objects)).toFixed(2), "overlap of the mask with ground truth, mean over objects");
  }
  return stats;
}

function comparisonOf([a, b], alike, large) {
  if (!alike) return [["of different grids", "", ""]];
  if (view.compare === "difference") {
    const moved = a.reduce((sum, value, i) => sum + Math.abs(value - b[i]), 0) / 2;
    return [["", percent(moved), large ? " elsewhere" : "", "half the sum of absolute differences"]];
  }
  const [first, second] = [a, b].map(values => fixed(entropyOf(values), 2));
  return [[large ? "H A " : "H ", first, "", "entropy in A"], [large ? "B " : "", second, "", "entropy in B"]];
}

// The mark of run A or B.
export function runDot(index) {
  const dot = el("span", {class: "dot", "aria-hidden": "true"});
  dot.style.background = runColour(index);
  return dot;
}

const runColour = index => `rgb(${RUN_COLOURS[index].join(", ")})`;
