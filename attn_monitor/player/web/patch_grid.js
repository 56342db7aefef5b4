// Where the patches of a grid lie in an image and on a canvas.

/** @import {Pair, PatchGrid, PatchRef} from "./types" */

/**
 * @param {Pair} shape
 * @param {{origin: Pair, cell: Pair, margin: number[]} | null} geometry null where the patches tile the image
 * @param {Pair} size of the image
 * @returns {PatchGrid}
 */
export function makePatchGrid(shape, geometry, size) {
  const whole = { origin: [0, 0], cell: [size[0] / shape[0], size[1] / shape[1]], margin: [] };
  const { origin, cell, margin } = /** @type {{origin: Pair, cell: Pair, margin: number[]}} */ (geometry ?? whole);
  return { shape, origin, cell, margin, size };
}

/**
 * The index along one axis of the patch at a coordinate of the image, -1 outside the grid.
 * @param {PatchGrid} patchGrid
 * @param {0 | 1} axis
 * @param {number} x
 */
function indexAt({ shape, origin, cell }, axis, x) {
  const index = Math.floor((x - origin[axis]) / cell[axis] + 1e-6);
  return index >= 0 && index < shape[axis] ? index : -1;
}

/**
 * The patch at a point of the image, -1 outside the grid.
 * @param {PatchGrid} patchGrid
 * @param {Pair} point
 */
export function patchAt(patchGrid, [y, x]) {
  const row = indexAt(patchGrid, 0, y);
  const column = indexAt(patchGrid, 1, x);
  return row >= 0 && column >= 0 ? row * patchGrid.shape[1] + column : -1;
}

/**
 * The patch of a grid at the centre of the visible part of a patch of another grid, -1 outside the grid.
 * @param {PatchGrid} patchGrid
 * @param {PatchRef} other
 */
export function matchingPatch(patchGrid, { patch, patchGrid: { shape, origin, cell, size } }) {
  if (patch < 0 || patch >= shape[0] * shape[1]) return -1;
  /** @type {(axis: 0 | 1, index: number) => number} */
  const centre = (axis, index) => {
    const start = origin[axis] + index * cell[axis];
    return (clamp(start, 0, size[axis]) + clamp(start + cell[axis], 0, size[axis])) / 2;
  };
  return patchAt(patchGrid, [centre(0, Math.floor(patch / shape[1])), centre(1, patch % shape[1])]);
}

/**
 * @param {number} value
 * @param {number} low
 * @param {number} high
 */
export const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

/**
 * The box of all patches on a canvas, and the size of one; the box may reach beyond the canvas.
 * @param {PatchGrid} patchGrid
 * @param {number} width
 * @param {number} height
 */
export function boxOf({ shape, origin, cell, size }, width, height) {
  const w = (cell[1] * width) / size[1];
  const h = (cell[0] * height) / size[0];
  const x = (origin[1] * width) / size[1];
  const y = (origin[0] * height) / size[0];
  return { x, y, w, h, width: shape[1] * w, height: shape[0] * h };
}

/**
 * The box of one patch on a canvas, cut at the canvas.
 * @param {PatchGrid} patchGrid
 * @param {number} row
 * @param {number} column
 * @param {number} width
 * @param {number} height
 */
export function cellOf(patchGrid, row, column, width, height) {
  const { x, y, w, h } = boxOf(patchGrid, width, height);
  return {
    left: clamp(x + column * w, 0, width),
    right: clamp(x + (column + 1) * w, 0, width),
    top: clamp(y + row * h, 0, height),
    bottom: clamp(y + (row + 1) * h, 0, height),
  };
}

/**
 * The parts of a canvas around what patches see, which may be more than the box of their cells, each [x, y, width, height].
 * @param {PatchGrid} patchGrid
 * @param {number} width
 * @param {number} height
 * @returns {[number, number, number, number][]}
 */
export function unseenBands(patchGrid, width, height) {
  const box = boxOf(patchGrid, width, height);
  const [down, across] = [0, 1].map((axis) => patchGrid.margin[axis] ?? 0);
  const x = (across * width) / patchGrid.size[1];
  const y = (down * height) / patchGrid.size[0];
  const left = clamp(Math.round(box.x - x), 0, width);
  const right = clamp(Math.round(box.x + box.width + x), 0, width);
  const top = clamp(Math.round(box.y - y), 0, height);
  const bottom = clamp(Math.round(box.y + box.height + y), 0, height);
  /** @type {[number, number, number, number][]} */
  const bands = [
    [0, 0, width, top],
    [0, bottom, width, height - bottom],
    [0, top, left, bottom - top],
    [right, top, width - right, bottom - top],
  ];
  return bands.filter(([, , w, h]) => w > 0 && h > 0);
}

/**
 * Intersection over union of a mask of patches with each object.
 * @param {Uint8Array} mask
 * @param {PatchGrid} patchGrid
 * @param {Uint8Array[]} objects masks of the image's pixels
 */
export function overlaps(mask, patchGrid, objects) {
  const [height, width] = patchGrid.size;
  const rows = Int32Array.from({ length: height }, (_, y) => indexAt(patchGrid, 0, y));
  const columns = Int32Array.from({ length: width }, (_, x) => indexAt(patchGrid, 1, x));
  return objects.map((object) => {
    let both = 0;
    let either = 0;
    for (let y = 0, i = 0; y < height; y++) {
      for (let x = 0; x < width; x++, i++) {
        const seen = rows[y] >= 0 && columns[x] >= 0;
        const inside = seen ? mask[rows[y] * patchGrid.shape[1] + columns[x]] : 0;
        both += inside & object[i];
        either += inside | object[i];
      }
    }
    return either ? both / either : NaN;
  });
}

/**
 * Row and column of a patch in its grid.
 * @param {{patch: number, patchGrid: PatchGrid}} patch
 */
export const placeOf = ({ patch, patchGrid: { shape } }) => [Math.floor(patch / shape[1]), patch % shape[1]];
