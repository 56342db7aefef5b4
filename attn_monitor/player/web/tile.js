// A tile: one map on a canvas with a caption. The pointer and arrow keys select a patch of it.
import { css } from "./colours.js";
import { partsOf } from "./columns.js";
import { contextOf, el } from "./elements.js";
import { drawing } from "./manifest.js";
import { cosines } from "./numbers.js";
import { fitCanvas, lineWidth, outlinedMask, paintMap } from "./painting.js";
import { clamp, matchingPatch, patchAt, placeOf } from "./patch_grid.js";
import { comparisonOf, featuresOf, statisticsOf } from "./statistics.js";
import { headName, hover, pinnedPatch, selectedPatch, shownLayers, shownQuery, state, view } from "./view.js";

/** @import {Column, Layer, PatchGrid, PatchRef} from "./types" */
/** @import {Part} from "./columns.js" */
/** @import {Content} from "./painting.js" */
/** @import {Statistic} from "./statistics.js" */

/** Whether the shown layer has features, or colours, of its patches. */
export const hasFeatures = () => shownLayers().some((layer) => layer.features > 0);
export const hasColours = () => shownLayers().some((layer) => layer.colors);
/** Whether there is attention of patches themselves. */
export const hasQueries = () => shownLayers().some((layer) => layer.queries.length > 0);

/**
 * The coloured dot of run A or B.
 * @param {number} index
 */
export function runDot(index) {
  const dot = el("span", { class: "dot", "aria-hidden": "true" });
  dot.style.background = css(drawing.difference.colours[index]);
  return dot;
}

/** A button with a map, that selects a head or an image. */
export class Tile {
  /** @param {HTMLElement} element that holds canvas and caption, and has the label */
  constructor(element) {
    this.large = false;
    this.element = element;
    this.labelled = element;
    this.canvas = el("canvas", { "aria-hidden": "true" });
    this.caption = el("span", { class: "caption" });
    this.image = 0;
    this.head = -1;
    /** @type {PatchGrid | null} */
    this.patchGrid = null;
    this.width = 0;
    this.canvas.addEventListener("pointermove", (event) => this.pointerMoved(event));
    this.canvas.addEventListener("pointerleave", () => hover(null));
    element.append(this.canvas, this.caption);
  }

  /** @param {() => void} onclick */
  static button(onclick) {
    return new Tile(el("button", { class: "tile", type: "button", onclick }));
  }

  /** The layout of the page is computed once, before any tile changes. */
  measure() {
    this.width = this.canvas.clientWidth;
  }

  /** @param {PointerEvent} event */
  pointerMoved(event) {
    hover(this.patchBelow(event));
  }

  /**
   * @param {MouseEvent} event
   * @returns {PatchRef | null}
   */
  patchBelow(event) {
    const { patchGrid, image } = this;
    if (!patchGrid) return null;
    const box = this.canvas.getBoundingClientRect();
    const [height, width] = patchGrid.size;
    const y = clamp(((event.clientY - box.top) / box.height) * height, 0, height - 1e-3);
    const x = clamp(((event.clientX - box.left) / box.width) * width, 0, width - 1e-3);
    const patch = patchAt(patchGrid, [y, x]);
    return patch < 0 ? null : { image, patch, patchGrid, tile: this };
  }

  /**
   * Draw a column's map of an image and a head, -1 for their mean.
   * @param {Column} column
   * @param {number} image
   * @param {number} head
   */
  draw(column, image, head) {
    const parts = partsOf(column);
    const missing = parts.find(({ layer }) => !layer || head >= layer.heads);
    const loading = !missing && parts.some(({ block }) => !block); // the canvas shows another step
    this.image = image;
    this.head = head;
    this.patchGrid = parts[0].layer?.patchGrid ?? null;
    this.element.classList.toggle("absent", Boolean(missing?.layer));
    this.element.classList.toggle("stale", loading);
    if (missing) this.drawMissing(column, missing.layer, head);
    else if (!loading) this.drawParts(column, /** @type {Required<Part>[]} */ (parts), head);
  }

  /**
   * @param {Column} column
   * @param {Layer | undefined} layer
   * @param {number} head
   */
  drawMissing(column, layer, head) {
    const reason = layer ? `there is no ${headName(head)}` : "not recorded at this step";
    this.caption.textContent = this.large || !layer ? reason : "";
    this.labelled.setAttribute("aria-label", `${column.title}, ${headName(head)}: ${reason}`);
    contextOf(this.canvas).clearRect(0, 0, this.canvas.width, this.canvas.height);
  }

  /**
   * @param {Column} column
   * @param {Required<Part>[]} parts
   * @param {number} head
   */
  drawParts(column, parts, head) {
    const { image, large } = this;
    const [first, second] = parts;
    const { patchGrid } = first.layer;
    const pinned = matchingPatch(patchGrid, pinnedPatch());
    const query = shownQuery(first.layer, image);
    const maps = parts.map(({ block, layer }) => block.map(image, head, shownQuery(layer, image)));
    const comparable = maps[0].length === maps.at(-1)?.length && samePlace(first.layer, parts[parts.length - 1].layer);
    const painting = {
      photo: first.run.photos[image],
      patchGrid,
      opacity: view.opacity,
      table: view.table,
      truths: view.truth ? first.run.truths[image] : [],
      hovered: state.hover?.image === image ? matchingPatch(patchGrid, state.hover) : -1,
      pinned: query >= 0 ? first.layer.queries[query] : large && view.image === image ? pinned : -1,
    };
    fitCanvas(this.canvas, patchGrid, this.width || 64);
    if (second && view.compare === "difference") {
      paintMap(this.canvas, { ...painting, content: comparable ? { pair: [maps[0], maps[1]] } : null });
    } else {
      parts.forEach((part, i) => {
        const outlined = view.mask && !(large && !["attention", "patch"].includes(view.show));
        const mask = outlined ? outlinedMask(maps[i], view.threshold) : null;
        const content = this.contentOf(part, maps[i]);
        const from = i ? view.swipe : 0;
        paintMap(this.canvas, { ...painting, content, mask, patchGrid: part.layer.patchGrid, from });
      });
      if (second) drawDivider(this.canvas);
    }
    const content = this.contentOf(first, maps[0]);
    const features = view.compare === "difference" && second ? null : featuresOf(content, patchGrid);
    const statistics = second
      ? comparisonOf(maps, comparable, large)
      : statisticsOf(maps[0], patchGrid, first.run.truths[image], large);
    const name = head < 0 ? "mean" : large ? `head ${head}` : String(head);
    const place = placeOf({ patch: first.layer.queries[query], patchGrid }).join(", ");
    if (features) this.drawCaption(features.name, features.statistics);
    else this.drawCaption(query >= 0 && large ? `${name}, of patch ${place}` : name, statistics);
    const text = statistics.map(({ before, value, after = "" }) => before + value + after).join(", ");
    const selected = large ? selectedPatch() : null;
    const label = `${column.title}, ${first.run.images[image].name}, ${headName(head)}: ${text}`;
    this.labelled.setAttribute("aria-label", selected ? `${label}, patch ${selected.patch}` : label);
  }

  /**
   * @param {Required<Part>} part
   * @param {Float32Array} values
   * @returns {Content}
   */
  contentOf({ block, layer }, values) {
    const colours = this.large && view.show === "colors" ? block.colours(this.image) : null;
    if (colours) return { colours };
    const pinned = matchingPatch(layer.patchGrid, pinnedPatch());
    if (this.large && view.show === "cosine" && block.width && pinned >= 0) {
      return { values: cosines(block.features(this.image), block.width, pinned), scale: "cosine" };
    }
    return { values, scale: view.scale };
  }

  /**
   * Elements are replaced only where their number has changed, since this runs at every step.
   * @param {string} name
   * @param {Statistic[]} statistics
   */
  drawCaption(name, statistics) {
    const { caption } = this;
    if (caption.children.length !== statistics.length + 1) {
      caption.replaceChildren(el("b"), ...statistics.map(() => el("span", { class: "stat" }, "", el("i"), "")));
    }
    const [title, ...spans] = /** @type {HTMLElement[]} */ ([...caption.children]);
    title.textContent = name;
    statistics.forEach(({ before, value, after = "", title = "" }, i) => {
      const [first, number, last] = spans[i].childNodes;
      spans[i].title = title;
      first.textContent = before;
      number.textContent = value;
      last.textContent = after;
    });
  }
}

/**
 * Whether patches lie at the same places; older archives do not know where theirs lie.
 * @param {Layer} a
 * @param {Layer} b
 */
function samePlace(a, b) {
  return !a.geometry || !b.geometry || JSON.stringify(a.patchGrid) === JSON.stringify(b.patchGrid);
}

/** @param {HTMLCanvasElement} canvas */
function drawDivider(canvas) {
  const context = contextOf(canvas);
  const x = Math.round(view.swipe * canvas.width);
  const line = lineWidth(canvas.width);
  context.fillStyle = "#000";
  context.fillRect(x - 2 * line, 0, 4 * line, canvas.height);
  context.fillStyle = "#fff";
  context.fillRect(x - line, 0, 2 * line, canvas.height);
}
