// The numbers of the selected patch beside it, on pages that have no room for the card beside the pictures.
import { partsOf } from "./columns.js";
import { el } from "./elements.js";
import { cosines, formatted } from "./numbers.js";
import { cellOf, clamp, matchingPatch, placeOf } from "./patch_grid.js";
import { headName, pinnedPatch, roleClass, selectedPatch, shownQuery, view } from "./view.js";

/** @import {Column, PatchRef} from "./types" */
/** @import {Tile} from "./tile.js" */

const DISTANCE = 10; // pixels from the patch, and from the edge of the window

export function makeReadout() {
  const title = el("b", {});
  const values = el("div", { class: "reading" });
  const element = el("div", { class: "readout", "aria-hidden": "true" }, title, values); // the card has the same

  /** @type {(columns: Column[], tiles: Tile[]) => void} */
  function draw(columns, tiles) {
    const patch = selectedPatch();
    const tile = patch?.tile ?? tiles.find((found) => found.large && found.image === patch?.image);
    element.hidden = !patch || !tile?.patchGrid || matchingPatch(tile.patchGrid, patch) < 0;
    if (!patch || !tile || element.hidden) return;
    const head = tile.large ? view.head : tile.head;
    const [row, column] = placeOf(patch);
    title.textContent = `Patch ${row}, ${column} · ${headName(head)}`;
    const cosine = tile.large && view.show === "cosine" && view.pin >= 0;
    if (cosine) title.textContent = `Patch ${row}, ${column} · cosine to the pinned one`;
    values.replaceChildren(...columns.flatMap((shown) => valuesOf(shown, patch, head, cosine)));
    place(element, tile, patch);
  }
  return { element, draw };
}

/**
 * @param {Column} column
 * @param {PatchRef} patch
 * @param {number} head
 * @param {boolean} cosine whether features are shown
 */
function valuesOf(column, patch, head, cosine) {
  return partsOf(column).flatMap(({ layer, block }, i) => {
    if (!layer || !block || head >= layer.heads) return [];
    const found = matchingPatch(layer.patchGrid, patch);
    const weight = `${formatted(block.patchWeight(patch.image, head, found, shownQuery(layer, patch.image)))}×`;
    const pinned = cosine && block.width ? matchingPatch(layer.patchGrid, pinnedPatch()) : -1;
    const text = pinned < 0 ? weight : formatted(cosines(block.features(patch.image), block.width, pinned)[found]);
    const label = column.runs.length > 1 ? `${column.role} ${"AB"[i]}` : column.title;
    const className = roleClass(column.role) + ((column.side ?? i) ? " other" : "");
    return [el("span", { class: `value ${className}` }, `${label} `, el("b", {}, text))];
  });
}

/**
 * Beside the patch, where there is room in the window.
 * @param {HTMLElement} element
 * @param {Tile} tile
 * @param {PatchRef} patch
 */
function place(element, tile, patch) {
  const patchGrid = /** @type {import("./types").PatchGrid} */ (tile.patchGrid);
  const [row, column] = placeOf({ ...patch, patch: matchingPatch(patchGrid, patch), patchGrid });
  const box = tile.canvas.getBoundingClientRect();
  const cell = cellOf(patchGrid, row, column, box.width, box.height);
  const { offsetWidth: width, offsetHeight: height } = element;
  const right = box.left + cell.right + DISTANCE;
  const left = right + width + DISTANCE > innerWidth ? box.left + cell.left - DISTANCE - width : right;
  const middle = box.top + (cell.top + cell.bottom) / 2;
  element.hidden = middle < 0 || middle > innerHeight; // scrolled away
  element.style.left = `${clamp(left, DISTANCE, innerWidth - width - DISTANCE)}px`;
  element.style.top = `${clamp(middle - height / 2, DISTANCE, innerHeight - height - DISTANCE)}px`;
}
