// Colours of maps and of colour bars, as attn_monitor.draw paints them.
import { contextOf } from "./elements.js";
import { drawing } from "./manifest.js";
import { clamp } from "./patch_grid.js";

const COSINE_OPACITY = 0.85; // Python draws no map of cosines

/** @param {number[]} colour */
export const css = (colour) => `rgb(${colour.join(", ")})`;

/** @import {Drawing} from "./types" */

/**
 * The scales of Python's pictures, and those of this page; ticks are at even distances.
 * @type {Drawing["scales"]}
 */
export const SCALES = {
  ...drawing.scales,
  cosine: { unit: "cosine similarity to the pinned patch", ticks: ["-1", "-0.5", "0", "0.5", "1"] },
  difference: {
    unit: "× uniform attention more in A, in B",
    ticks: drawing.difference.ticks,
  },
};

const TABLES = Object.fromEntries(
  Object.entries(drawing.tables).map(([name, text]) => [
    name,
    Uint8Array.from(atob(text), (character) => character.charCodeAt(0)),
  ]),
);

/**
 * Positions 0…1 of a map's weights on a scale.
 * @param {Float32Array} values
 * @param {string} scale
 */
function levelsOf(values, scale) {
  if (scale === "cosine") return values.map((value) => (value + 1) / 2);
  if (scale === "minmax") {
    const low = Math.min(...values);
    const span = Math.max(Math.max(...values) - low, 1e-12);
    return values.map((value) => (value - low) / span);
  }
  const [low, high] = drawing.uniform_range;
  const units = values.map((value) => Math.max(value * values.length, 1e-12));
  return units.map((unit) => clamp((Math.log2(unit) - low) / (high - low), 0, 1));
}

/**
 * Write a map as red, green, blue and alpha: the stronger the attention, the more it covers the photograph.
 * @param {Uint8ClampedArray} pixels
 * @param {Float32Array} values
 * @param {string} scale
 * @param {string} table
 * @param {number} opacity 1 for what Python's pictures have
 */
export function colourMap(pixels, values, scale, table, opacity) {
  const colours = TABLES[table];
  const [low, high] = drawing.opacity;
  levelsOf(values, scale).forEach((level, i) => {
    const entry = 3 * Math.floor(level * 255);
    pixels.set(colours.subarray(entry, entry + 3), 4 * i);
    pixels[4 * i + 3] = 255 * opacity * (scale === "cosine" ? COSINE_OPACITY : low + (high - low) * level);
  });
}

/**
 * Write b - a in the colour of the run that has more; no difference is transparent.
 * @param {Uint8ClampedArray} pixels
 * @param {Float32Array} a
 * @param {Float32Array} b
 * @param {number} opacity
 */
export function colourDifference(pixels, a, b, opacity) {
  a.forEach((value, i) => {
    const units = (b[i] - value) * a.length;
    const strength = Math.min(1, Math.log2(1 + Math.abs(units)) / drawing.difference.range);
    writeDifference(pixels, i, Math.sign(units) * strength, opacity);
  });
}

/**
 * @param {Uint8ClampedArray} pixels
 * @param {number} i
 * @param {number} level -1…1
 * @param {number} opacity
 */
function writeDifference(pixels, i, level, opacity) {
  const {
    colours,
    brightness,
    opacity: [slope, highest],
  } = drawing.difference;
  const strength = Math.abs(level);
  const share = brightness + (1 - brightness) * strength;
  pixels.set(
    colours[level < 0 ? 0 : 1].map((value) => value * share),
    4 * i,
  );
  pixels[4 * i + 3] = 255 * opacity * Math.min(highest, slope * strength);
}

/**
 * Draw a colour bar as one row of pixels, which CSS stretches.
 * @param {HTMLCanvasElement} canvas
 * @param {string} scale
 * @param {string} table
 */
export function drawColourBar(canvas, scale, table) {
  Object.assign(canvas, { width: 256, height: 1 });
  const image = contextOf(canvas).createImageData(256, 1);
  for (let i = 0; i < 256; i++) {
    if (scale === "difference") writeDifference(image.data, i, i / 127.5 - 1, 1);
    else image.data.set([...TABLES[table].subarray(3 * i, 3 * i + 3), 255], 4 * i);
  }
  contextOf(canvas).putImageData(image, 0, 0);
}
