// A large tile, and pinning a patch of it by the pointer or by keys.
import { el } from "./elements.js";
import { clamp, matchingPatch } from "./patch_grid.js";
import { hasFeatures, hasQueries, Tile } from "./tile.js";
import { change, firstLayer, hover, runB, selectedPatch, unpin, view } from "./view.js";

/** @import {PatchRef} from "./types" */

const CLICK_DISTANCE = 5; // pixels between pressing and releasing; more is a swipe

/** A figure in which a click pins a patch. */
export class LargeTile extends Tile {
  constructor() {
    super(el("figure", { class: "tile large" }));
    const caption = el("figcaption", { class: "caption" });
    this.caption.replaceWith(caption);
    this.caption = caption;
    this.large = true;
    this.labelled = this.canvas;
    this.canvas.removeAttribute("aria-hidden");
    this.canvas.role = "img";
    let pressedAt = 0;
    this.canvas.addEventListener("pointerdown", (event) => (pressedAt = event.clientX));
    this.canvas.addEventListener("click", (event) => {
      if (Math.abs(event.clientX - pressedAt) < CLICK_DISTANCE) pin(this.patchBelow(event));
    });
  }

  /** @param {PointerEvent} event */
  pointerMoved(event) {
    if (view.compare === "swipe" && event.buttons && runB()) {
      const box = this.canvas.getBoundingClientRect();
      change({ swipe: clamp((event.clientX - box.left) / box.width, 0, 1) });
    }
    super.pointerMoved(event);
  }
}

/** What is shown of a patch once it is pinned: its own attention, or else its cosine to the others, where there is any. */
function ofPinned() {
  if (view.show === "cosine" && hasFeatures()) return view.show;
  return hasQueries() ? "patch" : hasFeatures() ? "cosine" : view.show;
}

/**
 * Pin a patch, or unpin it where it is pinned.
 * @param {PatchRef | null} patch
 */
export function pin(patch) {
  if (!patch) return;
  const index = matchingPatch(firstLayer().patchGrid, patch);
  if (view.pin === index && view.image === patch.image) unpin();
  else change({ pin: index, image: patch.image, show: ofPinned() });
}

/**
 * Move the cursor by patches of the shown image, from the middle where there is none yet.
 * @param {number} rows
 * @param {number} columns
 */
export function moveCursor(rows, columns) {
  const { patchGrid } = firstLayer();
  const [height, width] = patchGrid.shape;
  const selected = selectedPatch();
  const central = width * (height >> 1) + (width >> 1);
  const from = selected?.image === view.image ? matchingPatch(patchGrid, selected) : central;
  const row = clamp(Math.floor(from / width) + rows, 0, height - 1);
  const column = clamp((from % width) + columns, 0, width - 1);
  hover({ image: view.image, patch: row * width + column, patchGrid });
}
