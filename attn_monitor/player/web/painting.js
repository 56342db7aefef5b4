// Paints one map on a canvas: photograph, colours, outlines of mask and ground truth, selected patches.
import { colourDifference, colourMap, css } from "./colours.js";
import { contextOf } from "./elements.js";
import { drawing } from "./manifest.js";
import { allFinite, entropyOf, massMask } from "./numbers.js";
import { boxOf, cellOf, unseenBands } from "./patch_grid.js";

/** @import {Pair, PatchGrid} from "./types" */

/**
 * @typedef {object} Content of a map: weights on a scale, or of two runs, or colours
 * @property {Float32Array} [values]
 * @property {string} [scale]
 * @property {[Float32Array, Float32Array]} [pair]
 * @property {Uint8Array} [colours]
 *
 * @typedef {object} Painting
 * @property {HTMLImageElement} photo
 * @property {PatchGrid} patchGrid
 * @property {Content | null} content null for the photograph alone
 * @property {number} opacity of colours, 0…1
 * @property {string} table
 * @property {Uint8Array | null} [mask] of patches
 * @property {Uint8Array[]} truths masks of pixels
 * @property {number} hovered patch, -1 for none
 * @property {number} pinned patch, -1 for none
 * @property {number} [from] share of the width, left of which nothing is painted
 */

const SCALED_PHOTOS = 8; // kept of each photograph

/**
 * Make each patch a whole number of the canvas's pixels, at least as many as it has on the screen.
 * @param {HTMLCanvasElement} canvas
 * @param {PatchGrid} patchGrid
 * @param {number} cssWidth
 */
export function fitCanvas(canvas, { cell, size }, cssWidth) {
  const pixels = Math.ceil((cssWidth * Math.min(2, devicePixelRatio) * cell[1]) / size[1]);
  const across = Math.max(4, Math.min(64, pixels));
  const down = Math.max(1, Math.round((across * cell[0]) / cell[1]));
  const height = Math.max(1, Math.round((down * size[0]) / cell[0]));
  const width = Math.max(1, Math.round((across * size[1]) / cell[1]));
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
}

/**
 * The mask to outline: none where attention is practically uniform, and the largest weights are noise.
 * @param {Float32Array} values
 * @param {number} threshold
 */
export function outlinedMask(values, threshold) {
  return entropyOf(values) > drawing.practically_uniform ? null : massMask(values, threshold);
}

/**
 * @param {HTMLCanvasElement} canvas
 * @param {Painting} painting
 */
export function paintMap(
  canvas,
  { photo, patchGrid, content, opacity, table, mask, truths, hovered, pinned, from = 0 },
) {
  const context = contextOf(canvas);
  const { width, height } = canvas;
  context.save();
  context.beginPath();
  context.rect(from * width, 0, width, height);
  context.clip();
  paintPhoto(context, photo, content ? Math.min(1, 2 * opacity) : 0);
  if (content) paintContent(context, content, patchGrid, opacity, table);
  if (content && opacity > 0) paintUnseen(context, unseenBands(patchGrid, width, height));
  strokeTruths(context, truths, patchGrid.size);
  if (mask) strokeMask(context, mask, patchGrid);
  if (pinned >= 0) strokePatch(context, pinned, patchGrid, 1.5);
  if (hovered >= 0) strokePatch(context, hovered, patchGrid, 1);
  context.restore();
}

/**
 * The width of a line on a canvas.
 * @param {number} width of the canvas
 */
export const lineWidth = (width) => Math.max(1, Math.round(width / 220));

/**
 * @param {CanvasRenderingContext2D} context
 * @param {HTMLImageElement} photo
 * @param {number} grey share of the dark grey photograph, the rest is in colour
 */
function paintPhoto(context, photo, grey) {
  const { width, height } = context.canvas;
  if (!photo.complete || !photo.naturalWidth) {
    context.fillStyle = "#808080";
    context.fillRect(0, 0, width, height);
    return;
  }
  if (grey < 1) context.drawImage(scaledPhoto(photo, false, width, height), 0, 0);
  context.globalAlpha = grey;
  if (grey > 0) context.drawImage(scaledPhoto(photo, true, width, height), 0, 0);
  context.globalAlpha = 1;
}

/** @type {WeakMap<HTMLImageElement, Map<string, HTMLCanvasElement>>} */
const scaledPhotos = new WeakMap();

/**
 * A photograph at the size of a canvas, kept since it is the same at every step.
 * @param {HTMLImageElement} photo
 * @param {boolean} grey
 * @param {number} width
 * @param {number} height
 */
function scaledPhoto(photo, grey, width, height) {
  const sizes = scaledPhotos.get(photo) ?? new Map();
  scaledPhotos.set(photo, sizes);
  const key = `${width} ${height} ${grey}`;
  if (!sizes.has(key)) {
    if (sizes.size >= SCALED_PHOTOS) sizes.clear();
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    contextOf(canvas).imageSmoothingQuality = "high";
    contextOf(canvas).drawImage(photo, 0, 0, width, height);
    if (grey) turnGrey(canvas);
    sizes.set(key, canvas);
  }
  return sizes.get(key);
}

/**
 * Grey, and darker: the colours on it then show attention alone.
 * @param {HTMLCanvasElement} canvas
 */
function turnGrey(canvas) {
  const image = contextOf(canvas).getImageData(0, 0, canvas.width, canvas.height);
  const { data } = image;
  for (let i = 0; i < data.length; i += 4) {
    const luma = 0.299 * data[i] + 0.587 * data[i + 1] + 0.114 * data[i + 2];
    data[i] = data[i + 1] = data[i + 2] = drawing.grey * luma;
  }
  contextOf(canvas).putImageData(image, 0, 0);
}

const patchCanvas = document.createElement("canvas"); // a pixel for each patch

/**
 * @param {CanvasRenderingContext2D} context
 * @param {Content} content
 * @param {PatchGrid} patchGrid
 * @param {number} opacity
 * @param {string} table
 */
function paintContent(context, { values, scale = "", pair, colours }, patchGrid, opacity, table) {
  const { width, height } = context.canvas;
  if (![values, ...(pair ?? [])].every((map) => !map || allFinite(map))) {
    context.fillStyle = css(drawing.missing);
    context.fillRect(0, 0, width, height);
    return;
  }
  const [rows, columns] = patchGrid.shape;
  Object.assign(patchCanvas, { width: columns, height: rows });
  const image = contextOf(patchCanvas).createImageData(columns, rows);
  if (pair) colourDifference(image.data, ...pair, opacity);
  else if (values) colourMap(image.data, values, scale, table, opacity);
  else if (colours) {
    for (let i = 0; i < rows * columns; i++) {
      image.data.set([...colours.subarray(3 * i, 3 * i + 3), 255 * opacity], 4 * i);
    }
  }
  contextOf(patchCanvas).putImageData(image, 0, 0);
  const box = boxOf(patchGrid, width, height);
  context.imageSmoothingEnabled = false;
  context.drawImage(patchCanvas, box.x, box.y, box.width, box.height);
}

/**
 * Darken and hatch the parts of the image that no patch sees.
 * @param {CanvasRenderingContext2D} context
 * @param {[number, number, number, number][]} bands
 */
function paintUnseen(context, bands) {
  if (!bands.length) return;
  const { width, height } = context.canvas;
  const line = lineWidth(width);
  context.save();
  context.beginPath();
  for (const band of bands) context.rect(...band);
  context.clip();
  context.fillStyle = `rgb(0 0 0 / ${1 - drawing.unseen.brightness / drawing.grey})`; // over the grey photograph
  context.fill();
  context.strokeStyle = css(drawing.unseen.line);
  context.lineWidth = line;
  context.beginPath();
  for (let x = 0; x < width + height; x += 6 * line) {
    context.moveTo(x, 0);
    context.lineTo(x - height, height);
  }
  context.stroke();
  context.restore();
}

/**
 * The inner border of a mask of patches, where it lies on the canvas.
 * @param {CanvasRenderingContext2D} context
 * @param {Uint8Array} mask
 * @param {PatchGrid} patchGrid
 */
function strokeMask(context, mask, patchGrid) {
  const { width, height } = context.canvas;
  const line = lineWidth(width);
  const [rows, columns] = patchGrid.shape;
  /** @type {(row: number, column: number) => boolean} */
  const inside = (row, column) =>
    row >= 0 && column >= 0 && row < rows && column < columns && mask[row * columns + column] > 0;
  context.fillStyle = css(drawing.mask);
  mask.forEach((value, patch) => {
    if (!value) return;
    const [row, column] = [Math.floor(patch / columns), patch % columns];
    const { left, top, right, bottom } = cellOf(patchGrid, row, column, width, height);
    if (!inside(row - 1, column)) context.fillRect(left, top, right - left, line);
    if (!inside(row + 1, column)) context.fillRect(left, bottom - line, right - left, line);
    if (!inside(row, column - 1)) context.fillRect(left, top, line, bottom - top);
    if (!inside(row, column + 1)) context.fillRect(right - line, top, line, bottom - top);
  });
}

/** @type {WeakMap<Uint8Array, Path2D>} */
const borders = new WeakMap();

/**
 * The border of an object as a path in pixels of the image.
 * @param {Uint8Array} object
 * @param {Pair} size
 */
function borderOf(object, [height, width]) {
  const known = borders.get(object);
  if (known) return known;
  const path = new Path2D();
  /** @type {(y: number, x: number) => boolean} */
  const outside = (y, x) => y < 0 || x < 0 || y >= height || x >= width || !object[y * width + x];
  /** @type {(x: number, y: number, toX: number, toY: number) => void} */
  const addLine = (x, y, toX, toY) => {
    path.moveTo(x, y);
    path.lineTo(toX, toY);
  };
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (!object[y * width + x]) continue;
      if (outside(y - 1, x)) addLine(x, y, x + 1, y);
      if (outside(y + 1, x)) addLine(x, y + 1, x + 1, y + 1);
      if (outside(y, x - 1)) addLine(x, y, x, y + 1);
      if (outside(y, x + 1)) addLine(x + 1, y, x + 1, y + 1);
    }
  }
  borders.set(object, path);
  return path;
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {Uint8Array[]} truths
 * @param {Pair} size
 */
function strokeTruths(context, truths, size) {
  const { width, height } = context.canvas;
  context.save();
  context.scale(width / size[1], height / size[0]);
  context.strokeStyle = css(drawing.truth);
  context.lineCap = "square";
  context.lineWidth = (lineWidth(width) * size[1]) / width;
  for (const object of truths) context.stroke(borderOf(object, size));
  context.restore();
}

/**
 * White on black, which is seen on every colour.
 * @param {CanvasRenderingContext2D} context
 * @param {number} patch
 * @param {PatchGrid} patchGrid
 * @param {number} thickness
 */
function strokePatch(context, patch, patchGrid, thickness) {
  const { width, height } = context.canvas;
  const columns = patchGrid.shape[1];
  const line = lineWidth(width) * thickness;
  const { left, top, right, bottom } = cellOf(patchGrid, Math.floor(patch / columns), patch % columns, width, height);
  for (const [colour, stroke] of /** @type {const} */ ([
    ["#000", 3 * line],
    ["#fff", line],
  ])) {
    context.strokeStyle = colour;
    context.lineWidth = stroke;
    context.strokeRect(left, top, right - left, bottom - top);
  }
}
